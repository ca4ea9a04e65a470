//! `nbdcast status`: asks a running engine and prints the answer.

use listener_agent::console::{Failure, say};

use super::{StatusArgs, load};
use crate::admin::client::{AdminUrl, ask_status};
use crate::status::render;

pub(super) async fn run(args: StatusArgs) -> Result<(), Failure> {
    let url = match &args.config {
        None => args.admin,
        Some(file) => {
            let listen = load(file)?.admin.listen;
            AdminUrl::of_listener(&listen)
                .ok_or_else(|| Failure::usage(format_args!("{}: admin.listen is not a TCP address", file.display())))?
        }
    };
    let report = ask_status(&url).await.map_err(|error| Failure::failed(&error).remedy(error.remedy()))?;
    if !args.json {
        return say(render(&report).trim_end());
    }
    let json = serde_json::to_string_pretty(&report)
        .map_err(|error| Failure::failed(format_args!("cannot write the status: {error}")))?;
    say(json)
}
