//! Random runs: faults while clients work, then healing, and what must be true after it.

use std::time::Duration;

use nbdcast::volume::ReadSpread::{Adaptive, Hedged, Multicast, Verify};
use nbdcast::volume::{Command, Damage, DropReason, Failure, Notice, ScrubFound};
use protocol::ranges::ByteRange;
use protocol::{AckPolicy, Epoch, Position, Seq};

use crate::check;
use crate::disk::SECTOR;
use crate::rng::Rng;
use crate::world::{Happening, Setup, Time, World, ms, replica_name};

/// A world drawn from a seed.
pub fn setup(seed: u64) -> Setup {
    let mut rng = Rng::new(seed ^ 0x5eed);
    let journal_bytes = rng.pick(&[128 << 10, 192 << 10, 256 << 10, 1 << 20]);
    let ack_write = rng.pick(&[AckPolicy::First, AckPolicy::First, AckPolicy::Majority, AckPolicy::All]);
    let ack_flush = if rng.percent(70) { ack_write } else { rng.pick(&[AckPolicy::Majority, AckPolicy::All]) };
    let replicas = rng.pick(&[1, 2, 2, 3, 3, 3, 4, 4]);
    Setup {
        seed,
        replicas,
        size_bytes: rng.pick(&[64 << 10, 256 << 10, 1 << 20, 2 << 20, 4 << 20]),
        journal_bytes,
        ack_write,
        ack_flush,
        policies_change: rng.percent(25),
        read: rng.pick(&[Adaptive, Adaptive, Multicast, Multicast, Hedged, Verify]),
        lag_bytes_max: rng.pick(&[journal_bytes / 8, journal_bytes / 4, journal_bytes / 2]),
        lag_max: ms(rng.pick(&[200, 1000, 5000])),
        throttle: rng.percent(30),
        min_replicas: if rng.percent(20) { 2.min(replicas) } else { 1 },
        freeze: ms(rng.pick(&[500, 2000, 10_000])),
        lease: ms(rng.pick(&[50, 300, 1000])),
        resync_rate_min: rng.pick(&[1 << 20, 16 << 20]),
        checksum_errors_max: rng.pick(&[3, 64, 64]),
        scrub_rate_min: rng.pick(&[1 << 20, 64 << 20]),
        scrubs: rng.percent(50),
        slowest: ms(rng.pick(&[1, 5, 20, 60])),
        in_flight_max: rng.pick(&[1, 3, 12, 12]),
        whole_blocks: rng.percent(30),
        hot_sectors: rng.pick(&[0, 16, 64, 64]),
        depth: rng.pick(&[2, 8, 24]),
    }
}

/// Runs one seed: a safety phase with faults, then healing, then everything is compared.
pub fn run(seed: u64) -> World {
    let mut world = World::new(setup(seed));
    world.wild = true;
    let time = ms(world.rng.pick(&[1000, 4000, 10_000]));
    world.after(ms(1), Happening::StartEngine { take_over: false });
    world.after(ms(50), Happening::Fault);
    world.run_for(time);
    heal(&mut world);
    live(&mut world);
    check::images(&mut world);
    world
}

/// Stops all faults: every agent runs, every engine is gone.
fn heal(world: &mut World) {
    world.trace(|| "everything heals".to_owned());
    world.wild = false;
    world
        .agenda
        .retain(|_, h| !matches!(h, Happening::Fault | Happening::StartEngine { .. } | Happening::StartAgent { .. }));
    for engine in 0..world.engines.len() {
        world.kill_engine(engine);
    }
    for agent in 0..world.agents.len() {
        let at = &mut world.agents[agent];
        at.disk.heal();
        (at.dies_at_checkpoint, at.dies_in_place) = (None, None);
        (at.stalled_until, at.cut_off_until) = (Time::ZERO, Time::ZERO);
        world.severed.clear();
        world.start_agent(agent);
    }
    // What stood still goes on within this time; agents that were asked to stop do so and come back.
    world.run_for(ms(4000));
    (0..world.agents.len()).for_each(|agent| world.start_agent(agent));
}

/// A new engine must serve soon, and answer everything.
fn live(world: &mut World) {
    // What happens with too few replicas is settled by the number alone.
    world.setup.min_replicas = 1;
    world.setup.freeze = Duration::from_secs(3600);
    world.setup.depth = 0;
    let engine = world.start_engine(true);
    let slow = world.setup.slowest * 2000;
    let served = world.run_until(ms(5000) + world.setup.lease * 2 + slow, |w| w.engines[engine].is_serving());
    assert!(served, "a new engine does not serve though everything is up: {:?}", world.refusals.last());
    let sectors = world.oracle.sectors();
    for chunk in 0..sectors / 16 {
        world.read(engine, chunk * 16, 16);
    }
    for _ in 0..50 {
        let (first, fua) = (world.rng.below(sectors as u64) as usize, world.rng.percent(20));
        let count = (world.rng.within(1, 20) as usize).min(sectors - first);
        world.write(engine, first, count, fua);
        world.run_for(ms(1));
    }
    world.flush(engine);
    let limit = world.setup.lag_max * 4 + ms(10_000) + slow;
    let answered = world.run_until(limit, |w| w.engines[engine].is_idle());
    assert!(answered, "requests are not answered though everything is up");
    let failed = world.engines[engine].answers.values().find(|a| a.is_err());
    assert!(failed.is_none_or(|f| *f == Err(Failure::Io) && rotten(world)), "a request fails: {failed:?}");
    world.read(engine, 0, sectors);
    let quiet = world.run_until(limit, |w| w.engines[engine].is_idle() && check::is_quiet(w, engine));
    assert!(quiet, "replicas do not catch up though everything is up");
    come_back(world, engine, limit);
    assert!(world.run_until(limit, |w| check::is_quiet(w, engine)), "members do not become equal");
    read_blocks(world, engine, limit);
    let answered = world.run_until(limit, |w| w.reads_outstanding(engine) == 0);
    assert!(answered, "{} reads are not answered by members, cancelled or not", world.reads_outstanding(engine));
    let false_alarm = world
        .notices
        .iter()
        .find(|n| matches!(n, Notice::BadBlock { what: Damage::Differs, .. } | Notice::NoMajority { .. }));
    assert_eq!(false_alarm, None, "all that was done to blocks is found by their checksums");
    scrub_twice(world, engine, limit);
}

/// A scrub finds nothing but what was flipped, and repairs what has a good copy anywhere: the next one finds nothing else.
fn scrub_twice(world: &mut World, engine: usize, limit: Duration) {
    let found = world.scrub_all(engine);
    assert!(
        found.differing_blocks == 0 && (found == ScrubFound::default() || rotten(world)),
        "a scrub finds {found:?}"
    );
    all_is_repaired(world, engine, limit, "a scrub looked at all");
    let lost = world.lost_blocks(engine);
    let again = world.scrub_all(engine);
    let expected = (lost.len() as u64, 0, 0);
    let told = (again.unrepaired_blocks, again.differing_blocks, again.incomplete_bytes);
    assert_eq!(told, expected, "a second scrub finds {again:?}, lost everywhere are {lost:?}");
}

fn rotten(world: &World) -> bool {
    world.agents.iter().any(|a| !a.rotten.is_empty())
}

/// Every replica comes back into the view. One that had too many bad blocks is ordered to, and a block that is bad on every
/// member cannot be copied.
fn come_back(world: &mut World, engine: usize, limit: Duration) {
    let everyone = world.agents.len();
    let is_back = |w: &World| w.view_of(engine).len() == everyone;
    for _ in 0..3 {
        if world.run_until(limit * 2, is_back) || !world.lost_blocks(engine).is_empty() {
            return;
        }
        for agent in 0..everyone {
            let kept_out = Notice::Dropping { replica: replica_name(agent), reason: DropReason::BadBlocks };
            if world.notices.contains(&kept_out) && !world.view_of(engine).contains(&agent) {
                let order = Command::Resync { replica: replica_name(agent), full: true };
                world.command(engine, order).expect("it is out of the view");
            }
        }
    }
    assert!(is_back(world), "replicas do not come back into the view though everything is up");
}

/// Reads fail for blocks that are bad on every member, and for no other. Where members are compared nothing else is bad
/// after it was read often enough.
fn read_blocks(world: &mut World, engine: usize, limit: Duration) {
    let lost = world.lost_blocks(engine);
    let blocks = world.setup.size_bytes / 4096;
    for block in 0..blocks {
        let token = world.read(engine, block as usize * 8, 8);
        assert!(world.run_until(limit, |w| w.answer(engine, token).is_some()), "a read is not answered");
        let is_lost = lost.contains(&(block * 4096));
        let answer = world.answer(engine, token).unwrap();
        assert_eq!(answer.is_err(), is_lost, "block {block} with {lost:?} lost everywhere: {answer:?}");
    }
    if world.setup.read != Verify {
        return;
    }
    all_is_repaired(world, engine, limit, "all were read");
}

/// Nothing stays bad but blocks that are bad at every member.
fn all_is_repaired(world: &mut World, engine: usize, limit: Duration, after: &str) {
    let is_whole = |w: &World| {
        let lost = w.lost_blocks(engine);
        w.view_of(engine).into_iter().all(|agent| w.bad_blocks(agent).iter().all(|block| lost.contains(block)))
    };
    let repaired = world.run_until(limit, |w| is_whole(w) && check::is_quiet(w, engine));
    let bad: Vec<_> = world.view_of(engine).into_iter().map(|agent| (agent, world.bad_blocks(agent))).collect();
    let lost = world.lost_blocks(engine);
    assert!(repaired, "bad blocks are not repaired though {after}: {bad:?}, lost everywhere {lost:?}");
}

impl World {
    /// Reads that members have not answered.
    pub fn reads_outstanding(&self, engine: usize) -> usize {
        self.engines[engine].volume.snapshot(self.now).peers.iter().map(|p| p.reads_outstanding).sum()
    }

    /// Something goes wrong, and the next thing is planned.
    pub fn draw_fault(&mut self) {
        let syncing = (0..self.agents.len()).find(|a| self.is_syncing(*a));
        let pause = self.rng.pick(if syncing.is_some() { &[5, 20, 60, 300] } else { &[30, 100, 300, 900] });
        self.after(ms(pause), Happening::Fault);
        if self.rng.percent(40) {
            // What was changed before stays as it is for a while: a change that was missed is not hidden by the next one.
            self.hot_first = self.rng.below(self.oracle.sectors() as u64 / 8) * 8;
        }
        let any = self.rng.below(self.agents.len() as u64) as usize;
        let agent = syncing.filter(|_| self.rng.percent(30)).unwrap_or(any);
        let time = ms(self.rng.pick(&[10, 60, 200, 600, 1500, 3000]));
        if self.rng.percent(6) {
            self.damage(any);
        }
        match self.rng.below(100) {
            0..12 => self.crash(agent, false, time),
            12..20 => self.crash(agent, true, time),
            20..23 => (0..self.agents.len()).for_each(|a| self.crash(a, true, time)),
            23..33 => self.stall_agent(agent, time),
            33..43 => self.cut_off(agent, time),
            43..53 => {
                let conns = self.conns_of_agent(agent);
                if !conns.is_empty() {
                    let conn = self.rng.pick(&conns);
                    self.cut(conn, false);
                }
            }
            53..57 => {
                self.close_agent(agent);
                self.start_agent_after(agent, time + ms(50));
            }
            57..61 => {
                self.trace(|| format!("a{agent}: the next durable write fails"));
                self.agents[agent].disk.fail_next();
            }
            61..65 => self.fill(agent, true),
            65..70 => (0..self.agents.len()).for_each(|a| self.fill(a, false)),
            70..72 => (0..self.agents.len()).for_each(|a| self.fill(a, true)),
            72..75 => self.damage(agent),
            75..82 => self.ask_for_resync(agent),
            82..86 => self.agents[any].dies_at_checkpoint = Some(self.rng.percent(60)),
            86..89 => self.agents[any].dies_in_place = Some(self.rng.below(12)),
            89..91 => self.plan_deaths_in_place(),
            _ => self.draw_engine_fault(time),
        }
    }

    /// All that write in place next die in it, and so does the engine.
    fn plan_deaths_in_place(&mut self) {
        for agent in 0..self.agents.len() {
            self.agents[agent].dies_in_place = Some(self.rng.below(12));
        }
        for engine in (0..self.engines.len()).filter(|e| self.engines[*e].alive).collect::<Vec<_>>() {
            let delay = self.rng.within(1, 60);
            self.after(ms(delay), Happening::KillEngine { engine });
        }
    }

    fn draw_engine_fault(&mut self, time: Duration) {
        let alive: Vec<usize> = (0..self.engines.len()).filter(|e| self.engines[*e].alive).collect();
        if alive.is_empty() {
            return;
        }
        let engine = self.rng.pick(&alive);
        match self.rng.below(6) {
            0 | 1 => self.kill_engine(engine),
            2 => self.freeze_engine(engine, time),
            3 if alive.len() < 3 => {
                if self.rng.percent(50) {
                    self.freeze_engine(engine, time);
                }
                self.start_engine(true);
            }
            4 => self.split(engine, alive.len() < 3, time),
            _ => self.stop_engine(engine),
        }
    }

    /// An engine is on one side of a split network. Another may be on the other.
    fn split(&mut self, engine: usize, another: bool, time: Duration) {
        let here: Vec<bool> = (0..self.agents.len()).map(|_| self.rng.percent(50)).collect();
        let other = (another && self.rng.percent(60)).then(|| self.start_engine(true));
        for (agent, is_here) in here.into_iter().enumerate() {
            match other {
                Some(other) if is_here => self.sever(other, agent, time),
                None | Some(_) if is_here => {}
                None | Some(_) => self.sever(engine, agent, time),
            }
        }
    }

    /// An operator wants a replica brought back now, or copied anew.
    fn ask_for_resync(&mut self, agent: usize) {
        let serving = |e: &usize| self.engines[*e].is_serving() && self.engines[*e].frozen_until <= self.now;
        let Some(engine) = (0..self.engines.len()).rfind(serving) else { return };
        let full = self.rng.percent(40);
        let outcome = self.command(engine, Command::Resync { replica: replica_name(agent), full });
        self.trace(|| format!("e{engine} is to bring a{agent} back{}: {outcome:?}", if full { " anew" } else { "" }));
    }

    pub fn crash(&mut self, agent: usize, power_cut: bool, time: Duration) {
        if self.agents[agent].process.is_some() {
            self.kill_agent(agent, power_cut);
            self.start_agent_after(agent, time);
        }
    }

    fn fill(&mut self, agent: usize, full: bool) {
        self.trace(|| format!("a{agent}: its disk is {}", if full { "full" } else { "not full" }));
        self.agents[agent].disk.set_full(full);
    }

    /// Some blocks of a replica go bad: not those that nobody else has. A replay after a crash cannot tell a flipped bit in
    /// a block that a record changes in part, so that bits flip only where records are of whole blocks; and where the last group
    /// has intents, it counts because of their blocks.
    fn damage(&mut self, agent: usize) {
        let engine = (0..self.engines.len()).rfind(|e| self.engines[*e].is_serving());
        let others: Vec<usize> = match engine {
            Some(engine) => self.view_of(engine).into_iter().filter(|a| *a != agent).collect(),
            None => return,
        };
        let runs = |a: &usize| self.agents[*a].process.is_some();
        let others: Vec<usize> = others.into_iter().filter(runs).collect();
        for _ in 0..self.rng.pick(&[1, 1, 3, 8]) {
            let block = self.rng.below(self.setup.size_bytes / 4096) * 4096;
            let flips = self.setup.whole_blocks && self.rng.percent(60);
            let offset = block + self.rng.below(4096);
            let proves = |range: &ByteRange| range.shares_block(ByteRange { offset: block, length: 1 });
            if self.agents[agent].last_in_place.iter().any(proves) {
                continue;
            }
            if !others.iter().any(|other| self.is_good(*other, block)) {
                continue;
            }
            if flips {
                self.rot(agent, offset);
            } else {
                self.spoil(agent, block);
            }
        }
    }

    /// Whether a block of a replica can be read and matches its checksum.
    fn is_good(&self, agent: usize, block: u64) -> bool {
        let Some(process) = &self.agents[agent].process else { return false };
        let range = ByteRange { offset: block, length: 4096 };
        process.image.read_verified(range).is_ok_and(|found| found.is_ok())
    }

    fn bad_blocks(&self, agent: usize) -> Vec<u64> {
        (0..self.setup.size_bytes).step_by(4096).filter(|block| !self.is_good(agent, *block)).collect()
    }

    /// The members that an engine counts on.
    fn view_of(&self, engine: usize) -> Vec<usize> {
        let view = self.engines[engine].volume.snapshot(self.engine_now(engine)).view;
        (0..self.agents.len()).filter(|agent| view.contains(&replica_name(*agent))).collect()
    }

    /// Blocks that are bad on every member.
    fn lost_blocks(&self, engine: usize) -> Vec<u64> {
        let view = self.view_of(engine);
        let Some(first) = view.first() else { return Vec::new() };
        let is_lost = |block: &u64| view.iter().all(|agent| !self.is_good(*agent, *block));
        self.bad_blocks(*first).into_iter().filter(is_lost).collect()
    }
}

/// How often a replica was brought back.
pub fn returns(world: &World) -> u64 {
    let mut resynced = std::collections::BTreeSet::new();
    let mut count: u64 = 0;
    for notice in &world.notices {
        match notice {
            Notice::Resyncing { replica } => _ = resynced.insert(replica.clone()),
            Notice::ViewInForce { view, .. } => {
                let before = resynced.len();
                resynced.retain(|replica| !view.contains(replica));
                count += (before - resynced.len()) as u64;
            }
            _other => {}
        }
    }
    count
}

/// How often an engine settled what a crash had left unsettled.
pub fn settlings(world: &World) -> u64 {
    world.notices.iter().filter(|n| matches!(n, Notice::Settling { .. })).count() as u64
}

/// How many bad blocks became good again.
pub fn repairs(world: &World) -> u64 {
    world.notices.iter().filter(|n| matches!(n, Notice::Repaired { .. })).count() as u64
}

/// Whether the oracle and the story of a run mention a drop of a replica.
pub fn drops(world: &World) -> u64 {
    world.notices.iter().filter(|n| matches!(n, Notice::Dropping { .. })).count() as u64
}

/// The last record of a log with this history up to `seq`.
pub fn position(history: &protocol::EpochHistory, seq: Seq) -> Position {
    Position { epoch: history.epoch_at(seq).unwrap_or(Epoch(0)), seq }
}

/// Bytes of the volume.
pub fn size(world: &World) -> usize {
    world.oracle.sectors() * SECTOR
}
