//! What an operator orders with `nbdcast` while an engine runs, and the events that it tells of it.

use serde_json::Value;

use crate::cluster::Cluster;
use crate::plan::VOLUME;
use crate::program::Finished;
use crate::status;

/// What the command printed, or with which code and words it failed.
pub type Outcome = Result<String, String>;

fn outcome(finished: &Finished) -> Outcome {
    assert!(!finished.stderr.contains("panicked"), "an error is not a panic: {finished}");
    if finished.status.success() { Ok(finished.stdout.clone()) } else { Err(finished.to_string()) }
}

impl Cluster {
    fn order(&self, words: &[&str]) -> Outcome {
        outcome(&self.nbdcast(words))
    }

    /// A replica more, at the agent `name`; ends when it is a member.
    pub fn replica_add(&self, name: &str) -> Outcome {
        self.order(&["replica", "add", VOLUME, name, "--address", &self.address(name)])
    }

    pub fn replica_remove(&self, name: &str) -> Outcome {
        self.order(&["replica", "remove", VOLUME, name])
    }

    pub fn replica_replace(&self, old: &str, new: &str) -> Outcome {
        self.order(&["replica", "replace", VOLUME, old, new, "--address", &self.address(new)])
    }

    /// Brings it back, with `--full` or not; ends when it is a member.
    pub fn replica_resync(&self, name: &str, further: &[&str]) -> Outcome {
        self.order(&[&["replica", "resync", VOLUME, name], further].concat())
    }

    pub fn resize(&self, size: u64) -> Outcome {
        self.order(&["resize", VOLUME, &format!("{}KiB", size >> 10)])
    }

    /// Has all replicas compared; with `--wait` it ends when that is done.
    pub fn scrub(&self, further: &[&str]) -> Outcome {
        self.order(&[&["scrub", VOLUME], further].concat())
    }

    /// Gives up a replica that a start waits for, with what only it holds; ends when the volume serves.
    pub fn activate_without(&self, name: &str, further: &[&str]) -> Outcome {
        self.order(&[&["activate", VOLUME, "--without", name], further].concat())
    }

    fn address(&self, name: &str) -> String {
        format!("127.0.0.1:{}", self.agent(name).port)
    }

    /// Texts of the events so far, with the replica's name in front where they are about one.
    pub fn events(&self) -> Vec<String> {
        let answer = status::http_get(self.admin_port, "/events").expect("/events");
        let events: Value = serde_json::from_str(&answer).expect("/events is JSON");
        let list = events.as_array().expect("a list of events");
        let shown = list.iter().map(|event| {
            let replica = event["replica"].as_str().map_or_else(String::new, |name| format!("{name}: "));
            format!("{replica}{}", event["text"].as_str().expect("an event's text"))
        });
        shown.collect()
    }

    /// An event must have happened whose text holds all of `words`.
    #[track_caller]
    pub fn assert_event(&self, words: &[&str]) {
        let events = self.events();
        let found = events.iter().any(|event| words.iter().all(|word| event.contains(word)));
        assert!(found, "an event should say {words:?}: {events:#?}");
    }
}
