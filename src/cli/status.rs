//! `nbdcast status`: asks a running engine and prints the answer.

use listener_agent::console::{Failure, say};

use super::{StatusArgs, engine_url, not_answered};
use crate::admin::client::ask_status;
use crate::status::render;

pub(super) async fn run(args: StatusArgs) -> Result<(), Failure> {
    let report = ask_status(&engine_url(&args.engine)?).await.map_err(not_answered)?;
    if !args.json {
        return say(render(&report).trim_end());
    }
    let json = serde_json::to_string_pretty(&report)
        .map_err(|error| Failure::failed(format_args!("cannot write the status: {error}")))?;
    say(json)
}
