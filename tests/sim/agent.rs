//! Agents as `listener_agent::host` runs them, with virtual time in place of threads: jobs are taken, take their time,
//! and are told as done.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use listener_agent::carry_out;
use listener_agent::disk::aligned::AlignedBuffer;
use listener_agent::image::Image;
use listener_agent::journal;
use listener_agent::journal::recover::RecoverError;
use listener_agent::recovery::recover;
use listener_agent::replica::{ApplyJob, ExtendJob, FetchJob, GroupJob, GroupOutcome, MetadataJob, ReadJob, Replica};
use listener_agent::superblock::Superblock;
use protocol::message::{Condition, ReadOutcome};
use protocol::ranges::ByteRange;
use protocol::record::Amended;
use protocol::scrub::BlockFound;
use protocol::{ToAgent, ToEngine};

use crate::disk::Disk;
use crate::net::{Conn, ConnId};
use crate::world::{Happening, Time, World, ms};

/// How often an agent looks at the clock.
const LOOK: Duration = ms(50);
const READERS: usize = 2;
/// A read of so many bytes is tried at once.
const READ_AT_ONCE_BYTES_MAX: u64 = 64 << 10;

pub struct Agent {
    pub disk: Disk,
    pub process: Option<Process>,
    /// Counts its processes.
    pub life: u64,
    pub stalled_until: Time,
    pub cut_off_until: Time,
    /// Until when reads of its disk do not come back.
    pub reads_hang_until: Time,
    pub starts_at: Option<Time>,
    /// It dies when it next writes pages of its dirty bitmaps; whether in a power cut.
    pub dies_at_checkpoint: Option<bool>,
    /// It dies after so many writes of the next group with an intent: the first is that of the group.
    pub dies_in_place: Option<u64>,
    /// What the intents of its last group wrote: nothing but these bytes may prove that it counts.
    pub last_in_place: Vec<ByteRange>,
    /// Intents that it carried out.
    pub intents: u64,
    /// How often it was opened with a log that had to be cut off.
    pub cuts: u64,
    /// Reads that were at work.
    pub reads_done: u64,
    /// Somebody damaged its superblock or its journal, so that it may be refused; and why it was.
    pub is_damaged: bool,
    pub refusal: Option<String>,
    /// First bytes of blocks whose bits were flipped.
    pub rotten: Vec<u64>,
}

/// A running agent.
pub struct Process {
    pub replica: Replica,
    pub image: Image,
    started: Time,
    jobs: BTreeMap<u64, Job>,
    next_job: u64,
}

enum Job {
    Group(GroupJob),
    Apply(ApplyJob),
    Metadata(Box<MetadataJob>),
    Read(ReadJob),
    Fetch(FetchJob),
    Extend(ExtendJob),
}

impl Agent {
    pub fn new(disk: Disk) -> Agent {
        Agent {
            disk,
            process: None,
            life: 0,
            stalled_until: Time::ZERO,
            cut_off_until: Time::ZERO,
            reads_hang_until: Time::ZERO,
            starts_at: None,
            dies_at_checkpoint: None,
            dies_in_place: None,
            last_in_place: Vec::new(),
            intents: 0,
            cuts: 0,
            reads_done: 0,
            is_damaged: false,
            refusal: None,
            rotten: Vec::new(),
        }
    }

    pub fn replica(&self) -> &Replica {
        &self.process.as_ref().expect("the agent runs").replica
    }
}

impl Process {
    fn readers(&self) -> usize {
        self.jobs.values().filter(|j| matches!(j, Job::Read(_) | Job::Fetch(_) | Job::Extend(_))).count()
    }

    /// The next job of any sort that its worker is free for.
    fn next_job(&mut self, now: Time) -> Option<Job> {
        if let Some(job) = self.replica.next_group() {
            return Some(Job::Group(job));
        }
        if let Some(job) = self.replica.next_metadata(now) {
            return Some(Job::Metadata(Box::new(job)));
        }
        if let Some(job) = self.replica.next_apply(now) {
            return Some(Job::Apply(job));
        }
        if self.readers() >= READERS {
            return None;
        }
        let read = self.replica.next_read().map(Job::Read);
        let fetch = read.or_else(|| self.replica.next_fetch().map(Job::Fetch));
        fetch.or_else(|| self.replica.next_extend().map(Job::Extend))
    }

    /// The rule that callers of the image live by.
    fn check_no_conflict(&self) {
        for read in self.jobs.values() {
            let Job::Read(read) = read else { continue };
            if read.looks() {
                self.check_no_change(read);
            }
        }
    }

    fn check_no_change(&self, read: &ReadJob) {
        for job in self.jobs.values() {
            let changes = match job {
                Job::Apply(apply) => apply.changes.ranges(),
                Job::Group(group) => group.in_place().map(|record| record.header.range()).collect(),
                Job::Metadata(_) | Job::Read(_) | Job::Fetch(_) | Job::Extend(_) => continue,
            };
            let clash = changes.into_iter().find(|r| r.shares_block(read.range));
            assert!(clash.is_none(), "read {read:?} and a change of {clash:?} are at work on one block");
        }
    }
}

fn write_group(disk: &Disk, image: &Image, job: &GroupJob) -> GroupOutcome {
    carry_out::write_group(&disk.files(), image, job, &mut AlignedBuffer::with_capacity(0)).0
}

/// Does the steps of a checkpoint before `stage`, and that one in part: the machine dies, or the process after so many
/// writes.
fn interrupt(disk: &Disk, image: &Image, job: &MetadataJob, stage: u64, writes: Option<u64>) {
    let files = disk.files();
    let steps: [&dyn Fn() -> bool; 3] =
        [&|| carry_out::prepare_image(image, job).is_ok(), &|| carry_out::write_pages(&files, job).is_ok(), &|| {
            carry_out::write_superblock(&files, job).is_ok()
        }];
    for (index, step) in (0..).zip(steps) {
        let is_done = match writes {
            _ if index < stage => step(),
            _ if index > stage => false,
            // A superblock is one write, which the system carries out once it was begun.
            Some(writes) => {
                disk.cut_short(writes, || _ = step());
                false
            }
            None => {
                disk.torn(|| _ = step());
                false
            }
        };
        if !is_done {
            return;
        }
    }
}

impl World {
    /// Opens the replica as `directory::open` does and begins to serve it.
    pub fn start_agent(&mut self, index: usize) {
        if self.agents[index].process.as_ref().is_some_and(|p| p.replica.condition() == Condition::Poisoned) {
            self.kill_agent(index, false);
        }
        let agent = &mut self.agents[index];
        agent.starts_at = None;
        if agent.process.is_some() {
            return;
        }
        let files = agent.disk.files();
        let superblock = match Superblock::read(files.superblock.as_ref()) {
            Ok(superblock) => superblock,
            Err(e) if agent.is_damaged => return agent.refusal = Some(e.to_string()),
            Err(e) => panic!("a{index}: {e}"),
        };
        if let Err(e) = journal::check_header(files.journal.as_ref(), superblock.identity.uuid) {
            assert!(agent.is_damaged, "a{index}: {e}");
            return agent.refusal = Some(e.to_string());
        }
        let settled_before = superblock.unsettled_seq;
        let dies = self.wild && self.rng.percent(8);
        let opened = if dies {
            let writes = self.rng.below(16);
            agent.disk.cut_short(writes, || recover(files, superblock))
        } else {
            recover(files, superblock)
        };
        let opened = match opened {
            Ok(opened) => opened,
            Err(e @ RecoverError::Damaged { .. }) if agent.is_damaged => return agent.refusal = Some(e.to_string()),
            Err(RecoverError::Apply { cause, .. }) if cause.kind() == io::ErrorKind::StorageFull => {
                return self.start_agent_after(index, ms(500));
            }
            Err(RecoverError::Io(_) | RecoverError::Apply { .. }) if dies => {
                self.trace(|| format!("a{index} dies as it is opened"));
                if self.rng.percent(50) {
                    self.agents[index].disk.power_cut();
                }
                return self.start_agent_after(index, ms(50));
            }
            Err(RecoverError::Io(_)) => return self.start_agent_after(index, ms(100)),
            Err(e) => panic!("a{index} cannot be opened: {e}"),
        };
        agent.life += 1;
        agent.cuts += u64::from(opened.superblock.unsettled_seq > settled_before);
        for range in &opened.superblock.unsettled {
            // Sectors of both versions in one block: nobody flipped a bit, and it is bad all the same.
            for offset in (range.offset..range.end()).step_by(4096) {
                let block = ByteRange { offset, length: 4096 };
                if !agent.rotten.contains(&offset) && !matches!(opened.image.read_verified(block), Ok(Ok(_))) {
                    agent.rotten.push(offset);
                }
            }
        }
        let (life, durable) = (agent.life, opened.durable);
        let (superblock, ring, dirty) = (opened.superblock, opened.ring, opened.dirty);
        let replica = Replica::new(superblock, ring, durable, dirty, Time::ZERO, false);
        let image = opened.image;
        let jobs = BTreeMap::new();
        agent.process = Some(Process { replica, image, started: self.now, jobs, next_job: 0 });
        self.trace(|| format!("a{index} starts at {durable}"));
        self.after(LOOK, Happening::Look { agent: index, life });
    }

    pub fn start_agent_after(&mut self, index: usize, delay: Duration) {
        self.agents[index].starts_at = Some(self.now + delay);
        self.after(delay, Happening::StartAgent { agent: index });
    }

    pub fn look(&mut self, agent: usize, life: u64) {
        if self.agents[agent].life == life && self.agents[agent].process.is_some() {
            self.pump_agent(agent);
            self.after(LOOK, Happening::Look { agent, life });
        }
    }

    /// A new connection of an engine, if the agent runs.
    pub fn accept(&mut self, engine: usize, agent: usize) -> Option<ConnId> {
        let at = &self.agents[agent];
        if at.process.is_none() || self.link_down_until(engine, agent) > self.now {
            return None;
        }
        let id = self.next_conn;
        self.next_conn += 1;
        self.conns.insert(id, Conn::new(engine, agent, at.life));
        Some(id)
    }

    pub fn agent_message(&mut self, id: ConnId, message: ToAgent) {
        let now = self.now;
        let (agent, life) = (self.conns[&id].agent, self.conns[&id].life);
        let at = &mut self.agents[agent];
        let Some(process) = at.process.as_mut().filter(|_| at.life == life) else { return };
        let now = now - process.started;
        if let ToAgent::Append(record) = &message
            && record.header.amended
        {
            // What nobody can read any more is bad here, too.
            let blocks = Amended::of(record).expect("engines send what members gave").blocks;
            at.rotten.extend(blocks.iter().filter(|(_, bytes)| bytes.is_none()).map(|(offset, _)| offset));
        }
        match message {
            ToAgent::Hello(hello) => process.replica.open_session(id, hello.engine, now),
            other => process.replica.handle(now, id, other),
        }
        self.read_at_once(agent);
        self.pump_agent(agent);
    }

    /// Small reads that memory has everything for are done by whoever brings them; the moment at which a disk has to be
    /// waited for is drawn.
    fn read_at_once(&mut self, index: usize) {
        let agent = &mut self.agents[index];
        let Some(process) = &mut agent.process else { return };
        while let Some(job) = process.replica.next_read_at_once(READ_AT_ONCE_BYTES_MAX) {
            process.check_no_change(&job);
            let may_be_cached = agent.reads_hang_until <= self.now && self.rng.percent(50);
            match may_be_cached.then(|| process.image.read_cached(job.range)).flatten() {
                Some(outcome) => {
                    agent.reads_done += 1;
                    process.replica.read_done(job, outcome);
                }
                None => process.replica.not_cached(job),
            }
        }
    }

    pub fn agent_session_lost(&mut self, agent: usize, life: u64, id: ConnId) {
        let at = &mut self.agents[agent];
        if let Some(process) = at.process.as_mut().filter(|_| at.life == life) {
            process.replica.close_session(id);
            self.pump_agent(agent);
        }
    }

    /// Says what is to be said and begins what can be begun.
    pub fn pump_agent(&mut self, index: usize) {
        let now = self.now;
        let Some(process) = &mut self.agents[index].process else { return };
        let mut said = Vec::new();
        while let Some(message) = process.replica.poll_outbox() {
            said.push(message);
        }
        let mut begun = Vec::new();
        while let Some(job) = process.next_job(now - process.started) {
            process.next_job += 1;
            process.jobs.insert(process.next_job, job);
            begun.push(process.next_job);
        }
        process.check_no_conflict();
        let writes_pages = |id: &u64| matches!(&process.jobs[id], Job::Metadata(job) if !job.dirty_pages.is_empty());
        let writes_pages = begun.iter().any(writes_pages);
        let poisoned = process.replica.condition() == Condition::Poisoned;
        for (conn, message) in said {
            let over = matches!(message, ToEngine::Refused(_));
            let message = self.about_to_answer(index, message);
            self.send_to_engine(conn, &message);
            if over {
                self.close_from_agent(conn);
            }
        }
        for job in begun {
            let (mut delay, life) = (self.some_delay(), self.agents[index].life);
            let jobs = self.agents[index].process.as_ref().map(|p| &p.jobs);
            if jobs.is_some_and(|jobs| matches!(jobs.get(&job), Some(Job::Read(_)))) {
                delay = delay.max(self.agents[index].reads_hang_until.saturating_sub(now));
            }
            self.after(delay, Happening::Done { agent: index, life, job });
        }
        if writes_pages && let Some(power_cut) = self.agents[index].dies_at_checkpoint.take() {
            self.after(Duration::ZERO, Happening::Crash { agent: index, power_cut });
        }
        if self.agents[index].process.as_ref().is_some_and(|p| p.replica.is_closed()) {
            self.trace(|| format!("a{index} closed in good order"));
            self.end_process(index);
        } else if poisoned && self.agents[index].starts_at.is_none() && self.wild {
            // Somebody restarts it.
            let delay = self.rng.within(50, 1500);
            self.start_agent_after(index, ms(delay));
            self.trace(|| format!("a{index} is poisoned"));
        }
    }

    pub fn job_done(&mut self, index: usize, life: u64, job: u64) {
        let agent = &mut self.agents[index];
        let Some(process) = agent.process.as_mut().filter(|_| agent.life == life) else { return };
        let now = self.now - process.started;
        let Some(mut job) = process.jobs.remove(&job) else { return };
        match &mut job {
            Job::Group(job) => self.about_to_journal(index, job),
            Job::Apply(job) => self.about_to_apply(index, job),
            Job::Metadata(_) | Job::Read(_) | Job::Fetch(_) | Job::Extend(_) => {}
        }
        let agent = &mut self.agents[index];
        let Some(process) = &mut agent.process else { return };
        match job {
            Job::Group(job) if !job.intents.is_empty() && agent.dies_in_place.is_some() => {
                let writes = agent.dies_in_place.take().expect("just seen");
                agent.disk.cut_short(writes, || write_group(&agent.disk, &process.image, &job));
                if self.wild {
                    let (delay, power_cut) = (self.rng.within(50, 1500), self.rng.percent(50));
                    self.kill_agent(index, power_cut);
                    return self.start_agent_after(index, ms(delay));
                }
                return self.kill_agent(index, false);
            }
            Job::Group(job) => {
                let outcome = write_group(&agent.disk, &process.image, &job);
                if outcome == GroupOutcome::Durable {
                    agent.last_in_place = job.in_place().map(|record| record.header.range()).collect();
                    agent.intents += job.intents.len() as u64;
                }
                process.replica.group_done(outcome);
            }
            Job::Apply(job) => {
                let outcome = carry_out::apply(&process.image, &job);
                process.replica.apply_done(now, outcome.map_err(|e| carry_out::job_error(&e)));
            }
            Job::Metadata(job) => {
                let outcome = carry_out::write_metadata(&agent.disk.files(), &process.image, &job);
                process.replica.metadata_done(now, &job, outcome.map_err(|e| e.error));
            }
            Job::Read(job) => {
                let outcome = process.image.read(job.what, job.range);
                agent.reads_done += 1;
                // After a failed sync blocks may be anything; nobody is answered any more. So may blocks that are still to
                // be copied: no journal repairs what a crash left of an earlier copy.
                if let ReadOutcome::ChecksumMismatch { offset } | ReadOutcome::Unreadable { offset } = outcome
                    && process.replica.condition() != Condition::Poisoned
                    && !process.replica.superblock().syncing
                {
                    assert!(
                        agent.rotten.contains(&offset),
                        "a{index}: block at {offset} is bad, and no bit was flipped"
                    );
                }
                if let ReadOutcome::Scrubbed(found) = &outcome
                    && process.replica.condition() != Condition::Poisoned
                {
                    let blocks = (job.range.offset..).step_by(4096).zip(found);
                    let mut bad = blocks.filter(|(_, found)| **found == BlockFound::Mismatch);
                    let false_alarm = bad.find(|(offset, _)| !agent.rotten.contains(offset));
                    assert!(false_alarm.is_none(), "a{index}: {false_alarm:?} though no bit was flipped there");
                }
                process.replica.read_done(job, outcome);
            }
            Job::Fetch(job) => {
                let found = carry_out::fetch(&agent.disk.files(), &process.image, &job);
                process.replica.fetch_done(&job, found.unwrap_or_default());
            }
            Job::Extend(job) => {
                let outcome = carry_out::extend(&process.image, job.size_bytes).map_err(|e| (e.error, e.to_string()));
                process.replica.extend_done(job, outcome);
            }
        }
        self.pump_agent(index);
    }

    /// Whether it is out of the view and being copied to.
    pub fn is_syncing(&self, agent: usize) -> bool {
        self.agents[agent].process.as_ref().is_some_and(|p| p.replica.superblock().syncing)
    }

    /// The process dies. What it was about to do is done, done in part, or not.
    pub fn kill_agent(&mut self, index: usize, power_cut: bool) {
        let Some(process) = self.agents[index].process.take() else { return };
        self.trace(|| format!("a{index} dies{}", if power_cut { " in a power cut" } else { "" }));
        for job in process.jobs.into_values() {
            let fate = self.rng.below(3);
            let writes = self.rng.below(12);
            let disk = &self.agents[index].disk;
            match job {
                Job::Group(job) if !job.intents.is_empty() && (fate == 1 || (fate > 1 && !power_cut)) => {
                    // The journal has the group; of what is written in place the process gets so far.
                    disk.cut_short(writes, || _ = write_group(disk, &process.image, &job));
                }
                Job::Group(job) if power_cut && fate > 0 => disk.torn(|| _ = write_group(disk, &process.image, &job)),
                // A write that the process began is carried out even if nobody waits for it.
                Job::Group(job) if fate > 0 => _ = write_group(disk, &process.image, &job),
                Job::Apply(job) => {
                    disk.cut_short(writes, || _ = carry_out::apply(&process.image, &job));
                }
                Job::Metadata(job) => {
                    let stage = self.rng.below(4);
                    interrupt(disk, &process.image, &job, stage, (!power_cut).then_some(writes));
                }
                Job::Group(_) | Job::Read(_) | Job::Fetch(_) | Job::Extend(_) => {}
            }
        }
        if power_cut {
            self.agents[index].disk.power_cut();
        }
        for conn in self.conns_of_agent(index) {
            self.cut(conn, power_cut);
        }
        self.agents[index].stalled_until = self.now;
    }

    fn end_process(&mut self, index: usize) {
        self.agents[index].process = None;
        for conn in self.conns_of_agent(index) {
            self.close_from_agent(conn);
        }
    }

    /// Asks the agent to stop in good order.
    pub fn close_agent(&mut self, index: usize) {
        if let Some(process) = &mut self.agents[index].process {
            process.replica.close();
            self.pump_agent(index);
        }
    }

    /// Flips a bit of the image.
    pub fn rot(&mut self, index: usize, offset: u64) {
        self.trace(|| format!("a{index}: a bit of byte {offset} flips"));
        self.agents[index].disk.image.rot(offset as usize);
        self.agents[index].rotten.push(offset / 4096 * 4096);
    }

    /// Makes a block of the image unreadable.
    pub fn spoil(&mut self, index: usize, block: u64) {
        self.trace(|| format!("a{index}: the block at {block} cannot be read any more"));
        self.agents[index].disk.image.spoil(block as usize);
        self.agents[index].rotten.push(block);
    }

    pub fn stall_agent(&mut self, index: usize, time: Duration) {
        self.trace(|| format!("a{index} stands still for {time:?}"));
        self.agents[index].stalled_until = self.now + time;
    }
}
