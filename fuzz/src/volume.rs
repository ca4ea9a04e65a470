//! A volume whose replicas say anything, in any order, while clients work and time passes: it never panics, and it
//! answers each request once.

use std::time::Duration;

use bytes::Bytes;
use nbdcast::volume::{Command, Event, ReadSpread, Request, Volume, VolumeSettings, Zeroing};
use protocol::message::{Promised, Welcome};
use protocol::quorum::AckPolicies;
use protocol::ranges::ByteRange;
use protocol::{
    AckPolicy, Epoch, EpochHistory, Position, ReplicaName, Seq, ToAgent, ToEngine, View, ViewState, VolumeUuid,
};

use super::input::Input;

const SIZE_BYTES: u64 = 1 << 20;
const PEERS: usize = 3;

fn names() -> Vec<ReplicaName> {
    ["a", "b", "c"].map(|name| name.parse().expect("a name")).to_vec()
}

fn settings(policy: AckPolicy) -> VolumeSettings {
    VolumeSettings {
        name: "v".parse().expect("a name"),
        size_bytes: SIZE_BYTES,
        replicas: names(),
        ack_write: policy,
        ack_flush: policy,
        read: ReadSpread::Adaptive,
        reads_together: 8,
        lag_bytes_max: 1 << 20,
        lag_max: Duration::from_secs(1),
        throttle: false,
        min_replicas: 1,
        freeze: Duration::from_secs(1),
        lease: Duration::from_secs(1),
        start_timeout: Duration::from_secs(10),
        resync_rate_min: 1 << 20,
        checksum_errors_max: 64,
        scrub_rate_min: 1 << 20,
        take_over: false,
        engine: [7; 16],
    }
}

struct Run {
    volume: Volume<u64>,
    now: Duration,
    /// What the volume asked of each peer last.
    promise: [Epoch; PEERS],
    last: [Seq; PEERS],
    submitted: u64,
    answered: Vec<bool>,
    serves: bool,
}

pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let setup = input.u8();
    let policy = [AckPolicy::First, AckPolicy::Majority, AckPolicy::All][usize::from(setup % 3)];
    let volume = Volume::new(settings(policy), Duration::ZERO);
    let mut run = Run {
        volume,
        now: Duration::ZERO,
        promise: [Epoch(0); PEERS],
        last: [Seq(0); PEERS],
        submitted: 0,
        answered: Vec::new(),
        serves: false,
    };
    if setup & 128 != 0 {
        run.activate();
    }
    while !input.is_empty() {
        run.step(&mut input);
        run.settle();
    }
}

impl Run {
    /// All replicas are there and new.
    fn activate(&mut self) {
        for peer in 0..PEERS {
            self.volume.peer_connected(self.now, peer);
            self.settle();
            self.welcome(peer, Epoch(0));
            self.settle();
        }
        for peer in 0..PEERS {
            self.promised(peer, Seq(0), 0);
            self.settle();
        }
        for peer in 0..PEERS {
            self.volume.peer_message(self.now, peer, ToEngine::Durable { seq: self.last[peer] });
            self.settle();
        }
        assert!(self.serves, "three honest replicas make a volume");
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let peer = usize::from(input.u8()) % PEERS;
        match input.u8() % 12 {
            0 => self.volume.peer_connected(self.now, peer),
            1 => self.volume.peer_disconnected(self.now, peer, "it went".to_owned()),
            2 => {
                self.now += Duration::from_millis(input.number().min(100_000));
                self.volume.tick(self.now);
            }
            3 => {
                let (number, body, bulk) = input.message();
                if let Ok(message) = ToEngine::decode(number, body, bulk) {
                    self.volume.peer_message(self.now, peer, message);
                }
            }
            4 => self.welcome(peer, Epoch(input.number())),
            5 => {
                let seq = Seq(input.number());
                self.promised(peer, seq, input.u8());
            }
            6 => self.volume.peer_message(self.now, peer, ToEngine::Durable { seq: Seq(input.number()) }),
            7 => self.volume.peer_message(self.now, peer, ToEngine::Durable { seq: self.last[peer] }),
            8..=10 => self.submit(input),
            _ => {
                let replica = names()[peer].clone();
                let command = match input.u8() % 5 {
                    0 => Command::Remove { replica },
                    1 => Command::Resync { replica, full: input.u8().is_multiple_of(2) },
                    2 => Command::Resize { size_bytes: input.number() },
                    3 => Command::ActivateWithout { replicas: vec![replica] },
                    _ => return drop(self.volume.add_replica(self.now, replica)),
                };
                // A refusal is as good as anything.
                let _ = self.volume.command(self.now, command);
            }
        }
    }

    fn welcome(&mut self, peer: usize, promised: Epoch) {
        let welcome = Welcome {
            uuid: VolumeUuid([3; 16]),
            size_bytes: SIZE_BYTES,
            journal_bytes: 64 << 20,
            record_payload_bytes_max: 1 << 20,
            promised,
            other_engine_ms_ago: None,
        };
        self.volume.peer_message(self.now, peer, ToEngine::Welcome(welcome));
    }

    /// The promise that was asked for, with a history of one epoch.
    fn promised(&mut self, peer: usize, seq: Seq, flags: u8) {
        let mut history = EpochHistory::default();
        let position = Position { epoch: Epoch(u64::from(seq != Seq(0))), seq };
        if seq != Seq(0) {
            history.note(Position { epoch: Epoch(1), seq: Seq(1) });
        }
        let acks = AckPolicies { write: AckPolicy::First, flush: AckPolicy::First };
        let promised = Promised {
            epoch: self.promise[peer],
            position,
            size_bytes: SIZE_BYTES,
            views: ViewState::initial(View::new(names()).expect("a view")),
            history,
            acks: (seq != Seq(0)).then_some(acks),
            syncing: flags & 1 != 0,
            journal_first: Seq(1),
            stable: Seq(0),
            tracked: if flags & 2 != 0 { vec![(names()[1].clone(), Seq(0))] } else { Vec::new() },
            lease_remaining_ms: if flags & 4 != 0 { 100 } else { 0 },
            unsettled: if flags & 8 != 0 { vec![ByteRange { offset: 4096, length: 8192 }] } else { Vec::new() },
        };
        self.volume.peer_message(self.now, peer, ToEngine::Promised(promised));
    }

    fn submit(&mut self, input: &mut Input<'_>) {
        let offset = input.number() % SIZE_BYTES;
        let length = input.number().clamp(1, SIZE_BYTES - offset);
        let range = ByteRange { offset, length };
        let request = match input.u8() % 8 {
            0..=2 => {
                Request::Write { offset, data: Bytes::from(vec![5; length as usize]), fua: length.is_multiple_of(2) }
            }
            3 => Request::Zero { range, fua: false, how: Zeroing::Trim },
            4 => Request::Flush,
            5 => Request::Status(range),
            6 => Request::Prefetch(range),
            _ => Request::Read(range),
        };
        let token = self.submitted;
        self.submitted += 1;
        self.answered.push(false);
        self.volume.submit(self.now, token, request);
    }

    /// Takes everything that the volume says.
    fn settle(&mut self) {
        for peer in 0..PEERS {
            for message in self.volume.take_outbox(self.now, peer, 1 << 20) {
                match message {
                    ToAgent::Promise { epoch, .. } => self.promise[peer] = epoch,
                    ToAgent::Append(record) => self.last[peer] = record.seq(),
                    _ => {}
                }
            }
        }
        while let Some(event) = self.volume.poll_event() {
            match event {
                Event::Completed(token, _) => {
                    let answered = &mut self.answered[token as usize];
                    assert!(!*answered, "request {token} was answered twice");
                    *answered = true;
                }
                Event::Serving => self.serves = true,
                _ => {}
            }
        }
    }
}
