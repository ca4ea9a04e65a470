//! Bits that flip on the network between the real programs: what is damaged is refused, and nobody reads it.

use std::time::Duration;

use crate::cluster::Cluster;
use crate::plan::Plan;
use crate::proxy::{MARK, Proxy};
use crate::scratch;

const LIMIT: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;

fn marked(byte: u8) -> Vec<u8> {
    let mut block = vec![byte; BLOCK];
    block[1000..1000 + MARK.len()].copy_from_slice(MARK);
    block
}

#[test]
fn bits_that_flip_between_engine_and_agents_are_noticed_and_change_nothing() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::planned(Plan::default());
    let networks: Vec<Proxy> = ["a", "b", "c"].into_iter().map(|name| cluster.proxied(name)).collect();
    cluster.start_agents();
    cluster.create();
    cluster.start_engine();
    let mut client = cluster.connect();

    for (round, network) in (0..).zip(&networks) {
        network.flip_to_agent();
        client.write(round * BLOCK as u64, &marked(round as u8), 0).expect("the others take it at once");
        scratch::wait_until("the write was damaged on its way", LIMIT, || network.flips_left() == 0);
        for name in cluster.names() {
            cluster.wait_caught_up(name);
        }
    }
    cluster.assert_event(&["out of reach"]);

    networks[0].flip_to_engine();
    scratch::wait_until("an answer of a was damaged on its way", LIMIT, || {
        let bytes = client.read(0, BLOCK as u32).expect("another member answers");
        assert!(bytes == marked(0), "never wrong bytes");
        networks[0].flips_left() == 0
    });
    cluster.assert_event(&["a: ", "the bytes of an answer changed on their way"]);
    client.disconnect();
    cluster.end_well();
}
