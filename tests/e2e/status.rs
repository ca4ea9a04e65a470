//! What a running engine says about itself over its admin address.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

use crate::plan::VOLUME;

/// What the tests read from the status document of a one-volume engine.
pub struct Status {
    /// Names of the members, in alphabetical order.
    pub view: Vec<String>,
    pub epoch: u64,
    pub size: u64,
    pub replicas: Vec<ReplicaStatus>,
}

pub struct ReplicaStatus {
    pub name: String,
    pub state: String,
    pub lag_records: u64,
    pub lag_bytes: u64,
    /// Bad blocks found there, and those of them that are good again.
    pub checksum_errors: u64,
    pub repaired_blocks: u64,
    /// Why it is not in order.
    pub reason: Option<String>,
}

impl Status {
    pub fn of(document: &Value) -> Self {
        let volume = &document["volumes"][0];
        assert_eq!(volume["name"], VOLUME, "status names the volume: {document}");
        let text = |value: &Value| value.as_str().expect("a string in status").to_string();
        let number = |value: &Value| value.as_u64().expect("an unsigned number in status");
        let list = |value: &Value| value.as_array().expect("a list in status").clone();
        let mut view: Vec<String> = list(&volume["view"]).iter().map(text).collect();
        view.sort();
        Self {
            view,
            epoch: number(&volume["epoch"]),
            size: number(&volume["size"]),
            replicas: list(&volume["replicas"])
                .iter()
                .map(|replica| ReplicaStatus {
                    name: text(&replica["name"]),
                    state: text(&replica["state"]),
                    lag_records: number(&replica["lag_records"]),
                    lag_bytes: number(&replica["lag_bytes"]),
                    checksum_errors: number(&replica["checksum_errors"]),
                    repaired_blocks: number(&replica["repaired_blocks"]),
                    reason: replica["reason"].as_str().map(str::to_string),
                })
                .collect(),
        }
    }

    pub fn replica(&self, name: &str) -> &ReplicaStatus {
        let found = self.replicas.iter().find(|replica| replica.name == name);
        found.expect("status lists every replica")
    }
}

/// The body of `GET path` at a loopback port.
pub fn http_get(port: u16, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer.as_str(), ""));
    if head.split_whitespace().nth(1) == Some("200") {
        Ok(body.to_string())
    } else {
        Err(std::io::Error::other(format!("GET {path}: {head}")))
    }
}
