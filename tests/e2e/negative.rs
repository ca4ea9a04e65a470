//! What nbdsh sends wrong, with simple and with structured replies, with and without TLS: each is answered with the right
//! error, and the connection does its work afterwards.

use crate::scratch;
use crate::served::{Served, Volume};
use crate::tools;

#[test]
fn wrong_requests_get_their_error_and_the_connection_goes_on() {
    let _turn = scratch::shared_machine();
    let fixed = Volume::new("fixed", 8 << 20).with("read_only = true");
    let mut served = Served::with_tls("on", &[Volume::new("vol0", 40 << 20), fixed]);
    let [encrypted, _] = served.doors(true);
    let [_, plain] = served.doors(false);
    let uris = [plain.uri("vol0"), encrypted.uri("vol0"), plain.uri("fixed"), encrypted.uri("fixed")];
    let said = tools::run("nbdsh", |command| {
        command.arg("-c").arg(format!("uris = {uris:?}")).arg("-c").arg(include_str!("negative.py"));
    });
    let count = said.trim().rsplit(' ').next().and_then(|word| word.parse::<u32>().ok());
    assert!(count.is_some_and(|count| count > 150), "all of them were tried: {said}");
    assert!(!served.running().has_ended());
    assert!(served.stop("fixed").iter().all(|byte| *byte == 0), "nothing reached the read-only volume");
}
