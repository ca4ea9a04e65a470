//! How a story of recovery ends: every replica is a member again, a clean stop, identical images, and checksums that fit.
//! And what the engine said on the way there.

use std::process::Command;
use std::time::Duration;

use crate::cluster::{Agent, Cluster};
use crate::program::{self, Finished};
use crate::scratch;

/// The longest pause before a replica that was lost often is tried again, and time to copy to it.
const BACK_LIMIT: Duration = Duration::from_secs(150);

impl Cluster {
    /// Waits until `name` is a member again, however long it is left alone before it is tried.
    pub fn wait_member_again(&self, name: &str) {
        scratch::wait_until(&format!("{name} is a member again"), BACK_LIMIT, || {
            let status = self.status();
            status.view.iter().any(|member| member == name) && status.replica(name).state == "member"
        });
    }

    /// Waits for all replicas, stops everything, and compares and verifies what is on the disks, which is returned.
    pub fn end_well(&mut self) -> Vec<u8> {
        for name in self.names() {
            self.wait_member_again(name);
            self.wait_caught_up(name);
        }
        self.stop();
        self.verify_replicas();
        self.identical_images(&self.names())
    }

    /// Every block of every replica fits its checksum. Call it when nothing runs any more.
    pub fn verify_replicas(&self) {
        for agent in &self.agents {
            let verified = offline(&["verify"], agent);
            assert!(verified.status.success(), "verify of {}: {verified}", agent.name);
        }
    }

    /// How many lines of the engine's log hold all of `words`.
    pub fn times_logged(&self, words: &[&str]) -> usize {
        let printed = self.engine().printed();
        printed.lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }

    /// Waits until the engine's log has a line with all of `words`.
    pub fn wait_logged(&self, words: &[&str]) {
        scratch::wait_until(&format!("the engine logs {words:?}"), BACK_LIMIT, || self.times_logged(words) > 0);
    }
}

/// Runs `listener-agent WORDS DIR` on the agent's replica of the volume.
pub fn offline(words: &[&str], agent: &Agent) -> Finished {
    let mut command = Command::new(program::listener_agent());
    command.args(words).arg(agent.replica());
    program::finish(&mut command, Duration::from_secs(60))
}

/// Times of the words that the engine says when a replica leaves, is copied to, or is back without a copy.
pub const LEAVES: &str = "leaves the view";
pub const COPIED: &str = "what it lacks is copied";
pub const BACK: &str = "back,";
