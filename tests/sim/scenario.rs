//! What stories are told with: a world with an engine that serves, requests that are waited for, a look at who is where.

use bytes::Bytes;
use nbdcast::volume::{Answer, DropReason, Failure, Notice};
use protocol::Seq;
use protocol::extents::Allocation;

use crate::check;
use crate::disk::SECTOR;
use crate::oracle::Token;
use crate::world::{Setup, World, ms};

/// Long enough for anything that happens at all.
pub const LONG: std::time::Duration = ms(20_000);

/// A world with an engine that serves.
pub fn serving(setup: Setup) -> World {
    let mut world = World::new(setup);
    let engine = world.start_engine(false);
    assert!(world.run_until(LONG, |w| w.engines[engine].is_serving()));
    world
}

impl World {
    pub fn answer(&self, engine: usize, token: Token) -> Option<&Result<Answer, Failure>> {
        self.engines[engine].answers.get(&token)
    }

    /// Waits until the request ends well.
    pub fn done(&mut self, engine: usize, token: Token) -> Answer {
        assert!(self.run_until(LONG, |w| w.answer(engine, token).is_some()), "request {token} is not answered");
        self.answer(engine, token).unwrap().clone().expect("the request succeeds")
    }

    pub fn read_now(&mut self, engine: usize, first: usize, count: usize) -> Bytes {
        let token = self.read(engine, first, count);
        let Answer::Data(data) = self.done(engine, token) else { panic!("read {token} is answered without bytes") };
        data
    }

    /// How each of some sectors is kept: D for data, 0 for zeroes or a hole, ? where the answer ends before.
    pub fn status_now(&mut self, engine: usize, first: usize, count: usize) -> String {
        let token = self.status(engine, first, count);
        let Answer::Extents(found) = self.done(engine, token) else { panic!("status {token} has no extents") };
        let mut shown = String::new();
        for extent in found {
            let sign = if extent.allocation == Allocation::Data { "D" } else { "0" };
            shown += &sign.repeat(extent.length as usize / SECTOR);
        }
        format!("{shown:?<count$}")
    }

    pub fn durable(&self, agent: usize) -> Seq {
        self.agents[agent].replica().durable().seq
    }

    pub fn view(&self, engine: usize) -> String {
        let view = self.engines[engine].volume.snapshot(self.now).view;
        view.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    pub fn dropped_for(&self, reason: DropReason) -> bool {
        self.notices.iter().any(|n| matches!(n, Notice::Dropping { reason: found, .. } if *found == reason))
    }

    /// A new engine that serves, after the one before is gone.
    pub fn next_engine(&mut self) -> usize {
        let engine = self.start_engine(true);
        assert!(self.run_until(LONG, |w| w.engines[engine].is_serving()), "it serves: {:?}", self.refusals);
        engine
    }

    /// Waits until every replica is a member.
    pub fn everyone_is_back(&mut self, engine: usize) {
        let everyone = self.agents.len();
        let view = |w: &World| w.engines[engine].volume.snapshot(w.now).view.len();
        assert!(self.run_until(ms(120_000), |w| view(w) == everyone), "only {} are back", self.view(engine));
    }

    /// Engine 0 still reaches c alone, which knows nothing of the engine that the others follow from now on, nor of the
    /// write that this one acknowledges to its clients.
    pub fn supplant_behind_a_split(&mut self) {
        (0..2).for_each(|agent| self.sever(0, agent, ms(20_000)));
        let e = self.start_engine(true);
        self.sever(e, 2, ms(20_000));
        assert!(self.run_until(LONG, |w| w.engines[e].is_serving()));
        let write = self.write(e, 0, 8, false);
        self.done(e, write);
    }

    /// A write that c alone holds is acknowledged; then the engine and c are gone.
    pub fn lose_what_c_alone_holds(&mut self, engine: usize) -> Token {
        self.stall_agent(0, ms(100));
        self.stall_agent(1, ms(100));
        let token = self.write(engine, 0, 8, false);
        self.done(engine, token);
        self.kill_agent(2, true);
        self.kill_engine(engine);
        token
    }

    /// Everything settles, and every disk holds what it should.
    pub fn settle_and_compare(&mut self) {
        let engine = self.engines.len() - 1;
        assert!(self.run_until(LONG, |w| w.engines[engine].is_idle() && check::is_quiet(w, engine)));
        check::images(self);
    }
}
