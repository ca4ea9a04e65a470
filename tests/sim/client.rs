//! The clients of engines: what they ask for, and what is true of an answer when it comes.

use nbdcast::volume::{Answer, Failure, Request, Zeroing};
use protocol::Seq;
use protocol::ranges::ByteRange;

use crate::disk::SECTOR;
use crate::engine::policies;
use crate::oracle::{Token, payload};
use crate::world::{Happening, World, ms, replica_name};

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Read,
    Write,
    Flush,
    Status,
    Prefetch,
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    pub asked: Asked,
    /// The answer says that the flush policy holds up to here.
    pub flushes: Option<Seq>,
}

impl World {
    pub fn completed(&mut self, engine: usize, token: Token, outcome: Result<Answer, Failure>) {
        let Some(Waiting { asked, flushes }) = self.engines[engine].outstanding.remove(&token) else { return };
        self.trace(|| match &outcome {
            Ok(_) => format!("e{engine} {asked:?} {token} is answered"),
            Err(e) => format!("e{engine} {asked:?} {token} fails: {e:?}"),
        });
        if let (Some(seq), Ok(_)) = (flushes, &outcome) {
            self.check_flushed(engine, token, seq);
        }
        match (asked, &outcome) {
            (Asked::Read, Ok(Answer::Data(data))) => self.oracle.answer_read(token, data),
            (Asked::Status, Ok(Answer::Extents(found))) => self.oracle.answer_status(token, found),
            (Asked::Read | Asked::Status, Err(_)) => self.oracle.fail_read(token),
            (Asked::Write, Ok(Answer::Done)) => self.oracle.acknowledge_write(token),
            (Asked::Flush | Asked::Prefetch, Ok(Answer::Done))
            | (Asked::Write | Asked::Flush | Asked::Prefetch, Err(_)) => {}
            (asked, Ok(answer)) => panic!("{asked:?} {token} is answered with {answer:?}"),
        }
        if self.setup.depth == 0 || self.engines[engine].depth == 0 {
            self.engines[engine].answers.insert(token, outcome);
        }
    }

    /// So many members hold the record as the flush policy says. One that does not run is taken to hold it.
    fn check_flushed(&self, engine: usize, token: Token, seq: Seq) {
        let view = self.engines[engine].volume.snapshot(self.engine_now(engine)).view;
        let holds = |agent: &usize| {
            let process = self.agents[*agent].process.as_ref();
            view.contains(&replica_name(*agent)) && process.is_none_or(|p| p.replica.durable().seq >= seq)
        };
        let holding = (0..self.agents.len()).filter(holds).count();
        let needed = policies(&self.setup, engine).1.needed(view.len());
        assert!(holding >= needed, "request {token} is flushed, and {holding} of {needed} members hold record {seq}");
    }

    fn submit(&mut self, engine: usize, asked: Asked, make: impl FnOnce(&mut World, Token) -> Request) -> Token {
        let token = self.next_token;
        self.next_token += 1;
        let request = make(self, token);
        let now = self.engine_now(engine);
        let last = || self.engines[engine].volume.snapshot(now).seq;
        let flushes = match &request {
            Request::Flush => Some(last()),
            // Its own record comes after all there are.
            Request::Write { fua: true, .. } | Request::Zero { fua: true, .. } => Some(last().next()),
            Request::Read(_)
            | Request::Status(_)
            | Request::Prefetch(_)
            | Request::Write { .. }
            | Request::Zero { .. } => None,
        };
        self.engines[engine].outstanding.insert(token, Waiting { asked, flushes });
        self.trace(|| format!("e{engine} {asked:?} {token} {}", self.oracle.describe(token)));
        self.engines[engine].volume.submit(now, token, request);
        self.pump_engine(engine);
        token
    }

    /// Writes `count` sectors from `first` on.
    pub fn write(&mut self, engine: usize, first: usize, count: usize, fua: bool) -> Token {
        let reign = self.engines[engine].reign.expect("clients come when the engine serves");
        self.submit(engine, Asked::Write, |world, token| {
            world.oracle.submit_write(token, reign, first, count, false);
            Request::Write { offset: (first * SECTOR) as u64, data: payload(token, first, count), fua }
        })
    }

    /// Writes bytes that the oracle knows nothing of: nobody may read there.
    pub fn write_bytes(&mut self, engine: usize, offset: u64, data: Vec<u8>) -> Token {
        self.submit(engine, Asked::Flush, |_, _| Request::Write { offset, data: data.into(), fua: false })
    }

    pub fn zero(&mut self, engine: usize, first: usize, count: usize, how: Zeroing, fua: bool) -> Token {
        let reign = self.engines[engine].reign.expect("clients come when the engine serves");
        self.submit(engine, Asked::Write, |world, token| {
            world.oracle.submit_write(token, reign, first, count, true);
            Request::Zero { range: range(first, count), how, fua }
        })
    }

    pub fn read(&mut self, engine: usize, first: usize, count: usize) -> Token {
        let reign = self.engines[engine].reign.expect("clients come when the engine serves");
        self.submit(engine, Asked::Read, |world, token| {
            world.oracle.submit_read(token, reign, first, count);
            Request::Read(range(first, count))
        })
    }

    /// Asks how sectors are kept.
    pub fn status(&mut self, engine: usize, first: usize, count: usize) -> Token {
        let reign = self.engines[engine].reign.expect("clients come when the engine serves");
        self.submit(engine, Asked::Status, |world, token| {
            world.oracle.submit_read(token, reign, first, count);
            Request::Status(range(first, count))
        })
    }

    pub fn prefetch(&mut self, engine: usize, first: usize, count: usize) -> Token {
        self.submit(engine, Asked::Prefetch, |_, _| Request::Prefetch(range(first, count)))
    }

    pub fn flush(&mut self, engine: usize) -> Token {
        self.submit(engine, Asked::Flush, |_, _| Request::Flush)
    }

    /// The client of a wild engine asks for something.
    pub fn client(&mut self, engine: usize) {
        let at = &self.engines[engine];
        if !at.alive || at.depth == 0 {
            return;
        }
        let wanted = self.rng.within(1, 4) as usize;
        for _ in 0..wanted.min(at.depth.saturating_sub(at.outstanding.len())) {
            if self.engines[engine].alive {
                self.ask_something(engine);
            }
        }
        let pause = self.rng.within(1, 15);
        self.after(ms(pause), Happening::Client { engine });
    }

    fn ask_something(&mut self, engine: usize) {
        let sectors = self.oracle.sectors() as u64;
        let unit = if self.setup.whole_blocks { 8 } else { self.rng.pick(&[1, 1, 4, 8]) };
        let longest = self.rng.pick(&[8, 16, 40, 64]) / unit;
        let count = (self.rng.within(1, longest.max(1)) * unit).min(sectors);
        let mut first = self.rng.below((sectors - count) / unit + 1) * unit;
        if self.setup.hot_sectors > 0 && self.rng.percent(80) {
            first = (self.hot_first + self.rng.below(self.setup.hot_sectors / unit) * unit).min(sectors - count);
        }
        let (first, count) = (first as usize, count as usize);
        let fua = self.rng.percent(10);
        match self.rng.below(100) {
            0..50 => {
                self.write(engine, first, count, fua);
            }
            50..60 => {
                let how = self.rng.pick(&[Zeroing::Trim, Zeroing::Zero, Zeroing::ZeroKeepAllocated]);
                self.zero(engine, first, count, how, fua);
            }
            60..86 => {
                self.read(engine, first, count);
            }
            86..94 => {
                let whole = self.rng.percent(30);
                let (first, count) = if whole { (0, sectors as usize) } else { (first, count) };
                self.status(engine, first, count);
            }
            94 => {
                self.prefetch(engine, first, count);
            }
            _ => {
                self.flush(engine);
            }
        }
    }
}

fn range(first: usize, count: usize) -> ByteRange {
    ByteRange { offset: (first * SECTOR) as u64, length: (count * SECTOR) as u64 }
}
