//! What can happen, one step at a time. A message that is lost, a replica that hangs, an engine that crashed or froze are
//! steps that are not taken: the checker tries every order of every subset of the steps.

use stateright::{Model, Property};

use crate::properties;
use crate::record::{Blocks, Log, Members, Op, Record};
use crate::rules::Protocol;
use crate::state::{Answer, Engine, Following, Phase, Replica, Stage, State, Used};

/// A step. Engines are numbered by epoch less one, replicas from 0.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// A replica durably promises an engine its epoch, and the answer arrives.
    Promise { engine: usize, replica: usize },
    /// An engine that has enough answers chooses the history and gives out its first record.
    Choose { engine: usize },
    /// The next record in the queue to a replica becomes durable there.
    Deliver { engine: usize, replica: usize },
    /// An engine gives out a client's write; also one that was overtaken and does not know.
    Write { engine: usize },
    /// An engine gives out the view without this member.
    Drop { engine: usize, replica: usize },
    /// An engine learns that the pending view change is held by enough members of the old view.
    InForce { engine: usize },
    /// A dropped replica promises, and the engine gives out the Follow record that names its tail.
    Follow { engine: usize, replica: usize },
    /// The returning replica drops its tail and is syncing.
    Begin { engine: usize },
    /// All dirty blocks were copied from this member; the returning replica is synced.
    Copy { engine: usize, from: usize },
    /// The engine gives out the view with the returned replica.
    Add { engine: usize },
    /// An agent stops.
    Crash { replica: usize },
    /// It starts again.
    Restart { replica: usize },
}

impl Protocol {
    /// Whether a replica still listens to this engine.
    fn listens(replica: &Replica, engine: &Engine) -> bool {
        replica.up && replica.promised == engine.epoch
    }

    /// Up to which place records are in the queue to a replica. A replica that is being dropped is sent nothing more, but
    /// what was sent before may still arrive.
    fn queued_up_to(engine: &Engine, replica: usize) -> usize {
        if let Some(Following { stage: Stage::Asked, .. }) = engine.following.filter(|f| f.replica == replica) {
            return 0;
        }
        if engine.durable[replica].is_none() {
            return 0;
        }
        if engine.order.view().contains(replica) || engine.following.is_some_and(|f| f.replica == replica) {
            return engine.order.len();
        }
        engine.order.changes().filter(|change| change.old.contains(replica)).last().map_or(0, |change| change.at)
    }

    fn can_deliver(state: &State, engine: &Engine, to: usize) -> bool {
        let replica = &state.replicas[to];
        Self::listens(replica, engine)
            && replica.log.len() < Self::queued_up_to(engine, to)
            && replica.log.is_prefix_of(&engine.order)
    }

    /// Whether a member has everything that was given out, so that a block read there is the latest.
    fn can_copy_from(state: &State, engine: &Engine, from: usize) -> bool {
        let Some(Following { replica, stage: Stage::Begun, .. }) = engine.following else { return false };
        let all = |replica: &Replica| Self::listens(replica, engine) && replica.log == engine.order;
        !engine.pending
            && engine.in_force().contains(from)
            && all(&state.replicas[from])
            && all(&state.replicas[replica])
    }

    fn can_begin(&self, state: &State, engine: &Engine) -> bool {
        let Some(Following { replica, at, stage: Stage::Asked }) = engine.following else { return false };
        let view = engine.in_force();
        let held = engine.holding(view, at + 1) >= self.policy.view_change(view.len());
        Self::listens(&state.replicas[replica], engine) && (held || !self.rules.begin_waits_for_follow)
    }

    fn engine_actions(&self, state: &State, e: usize, actions: &mut Vec<Action>) {
        let engine = &state.engines[e];
        if engine.phase == Phase::Gathering {
            let asked = |r: &usize| state.replicas[*r].up && state.replicas[*r].promised < engine.epoch;
            let open = (0..self.bounds.replicas).filter(asked);
            actions.extend(open.map(|replica| Action::Promise { engine: e, replica }));
            if self.can_choose(engine) {
                actions.push(Action::Choose { engine: e });
            }
            return;
        }
        let reached = (0..self.bounds.replicas).filter(|r| Self::can_deliver(state, engine, *r));
        actions.extend(reached.map(|replica| Action::Deliver { engine: e, replica }));
        if self.may_come_into_force(engine) {
            actions.push(Action::InForce { engine: e });
        }
        if engine.phase == Phase::Serving && state.used.writes < self.bounds.writes {
            actions.push(Action::Write { engine: e });
        }
        self.membership_actions(state, e, actions);
    }

    fn membership_actions(&self, state: &State, e: usize, actions: &mut Vec<Action>) {
        let engine = &state.engines[e];
        let view = engine.in_force();
        if self.may_change_view(engine) && state.used.drops < self.bounds.drops && view.len() > 1 {
            let candidates = view.iter().filter(|r| state.used.drops > 0 || *r == self.bounds.replicas - 1);
            actions.extend(candidates.map(|replica| Action::Drop { engine: e, replica }));
        }
        match engine.following.map(|following| following.stage) {
            None if engine.phase == Phase::Serving && state.used.rejoins < self.bounds.rejoins => {
                let target = engine.order.view();
                let can = |r: &usize| {
                    let replica = &state.replicas[*r];
                    !view.contains(*r) && !target.contains(*r) && replica.up && replica.promised <= engine.epoch
                };
                let back = (0..self.bounds.replicas).filter(can);
                actions.extend(back.map(|replica| Action::Follow { engine: e, replica }));
            }
            Some(Stage::Asked) if self.can_begin(state, engine) => actions.push(Action::Begin { engine: e }),
            Some(Stage::Begun) => {
                let sources = (0..self.bounds.replicas).filter(|r| Self::can_copy_from(state, engine, *r));
                actions.extend(sources.map(|from| Action::Copy { engine: e, from }));
            }
            Some(Stage::Synced) if !engine.pending => actions.push(Action::Add { engine: e }),
            None | Some(Stage::Asked | Stage::Synced) => {}
        }
    }

    fn deliver(state: &mut State, e: usize, to: usize) {
        let engine = &mut state.engines[e];
        let replica = &mut state.replicas[to];
        let record = engine.order.records[replica.log.len()];
        replica.log.records.push(record);
        if let Op::Write(_) = record.op {
            replica.image = replica.image.and(replica.log.blocks_after(replica.log.len() - 1));
        }
        // A replica that is being dropped is no longer heard.
        if engine.order.view().contains(to) || engine.following.is_some_and(|f| f.replica == to) {
            engine.durable[to] = Some(replica.log.len());
        }
    }

    /// What a dropped replica is not known to hold.
    fn lacking(engine: &Engine, replica: usize) -> Blocks {
        engine.order.blocks_after(engine.durable[replica].unwrap_or(0))
    }

    fn drop_member(&self, engine: &mut Engine, replica: usize) {
        let synced = engine.following.filter(|following| following.stage == Stage::Synced);
        if let Some(Following { replica: back, .. }) = synced.filter(|_| self.rules.synced_sees_only_its_add) {
            // It is not waited for: it is let go, and comes back another time.
            engine.following = None;
            engine.durable[back] = None;
        }
        self.change_view(engine, engine.in_force().without(replica), Self::lacking(engine, replica));
    }

    fn follow(&self, state: &mut State, e: usize, back: usize) {
        let (engine, replica) = (&mut state.engines[e], &mut state.replicas[back]);
        replica.promised = engine.epoch;
        let tail = replica.log.blocks_after(replica.log.common_len(&engine.order));
        engine.durable[back] = None;
        engine.following = Some(Following { replica: back, at: engine.order.len(), stage: Stage::Asked });
        self.give_out(engine, Op::Follow { replica: back as u8, tail });
    }

    fn begin(state: &mut State, e: usize) {
        let engine = &mut state.engines[e];
        let Some(following) = &mut engine.following else { return };
        following.stage = Stage::Begun;
        let replica = &mut state.replicas[following.replica];
        replica.log = engine.order.up_to(following.at + 1);
        replica.syncing = true;
        engine.durable[following.replica] = Some(following.at + 1);
    }

    fn copy(state: &mut State, e: usize, from: usize) {
        let engine = &mut state.engines[e];
        let source = state.replicas[from].image;
        let Some(following) = &mut engine.following else { return };
        following.stage = Stage::Synced;
        let replica = &mut state.replicas[following.replica];
        replica.image = replica.image.copied(engine.order.dirty(following.replica), source);
        replica.syncing = false;
    }

    fn change_view(&self, engine: &mut Engine, members: Members, lacking: Blocks) {
        self.give_out(engine, Op::View { members, lacking });
        engine.pending = self.rules.view_waits_for_quorum;
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    /// All replicas in step, and the engine of epoch 1 serves.
    fn init_states(&self) -> Vec<State> {
        let created = Members::first(self.bounds.replicas);
        let log = Log { created, records: vec![Record { epoch: 1, op: Op::Start }] };
        let fresh = Replica { up: true, promised: 1, log: log.clone(), image: Blocks::default(), syncing: false };
        let replicas = std::array::from_fn(|_| fresh.clone());
        let mut engines: Vec<Engine> = (1..=self.bounds.engines as u8).map(|e| Engine::new(e, created)).collect();
        let first = &mut engines[0];
        first.order = log;
        created.iter().for_each(|replica| first.durable[replica] = Some(1));
        first.phase = Phase::Starting;
        self.take_note(first);
        vec![State { replicas, engines, used: Used::default() }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for engine in 0..state.engines.len() {
            self.engine_actions(state, engine, actions);
        }
        for (replica, at) in state.replicas.iter().enumerate().take(self.bounds.replicas) {
            if !at.up {
                actions.push(Action::Restart { replica });
            } else if state.used.crashes < self.bounds.crashes {
                actions.push(Action::Crash { replica });
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Promise { engine, replica } => {
                let at = &mut state.replicas[replica];
                at.promised = state.engines[engine].epoch;
                let answer = Answer { log: at.log.clone(), syncing: at.syncing };
                state.engines[engine].answers[replica] = Some(answer);
            }
            Action::Choose { engine } => self.choose(&mut state.engines[engine]),
            Action::Deliver { engine, replica } => Self::deliver(&mut state, engine, replica),
            Action::Write { engine } => {
                state.used.writes += 1;
                self.give_out(&mut state.engines[engine], Op::Write(state.used.writes));
            }
            Action::Drop { engine, replica } => {
                state.used.drops += 1;
                self.drop_member(&mut state.engines[engine], replica);
            }
            Action::InForce { engine } => state.engines[engine].pending = false,
            Action::Follow { engine, replica } => {
                state.used.rejoins += 1;
                self.follow(&mut state, engine, replica);
            }
            Action::Begin { engine } => Self::begin(&mut state, engine),
            Action::Copy { engine, from } => Self::copy(&mut state, engine, from),
            Action::Add { engine } => {
                let engine = &mut state.engines[engine];
                let back = engine.following.take()?;
                self.change_view(engine, engine.in_force().with(back.replica), Blocks::default());
            }
            Action::Crash { replica } => {
                state.used.crashes += 1;
                state.replicas[replica].up = false;
            }
            Action::Restart { replica } => {
                let at = &mut state.replicas[replica];
                at.up = true;
                if !self.rules.promise_is_durable {
                    at.promised = at.log.position().0;
                }
            }
        }
        for engine in state.engines.iter_mut().filter(|engine| engine.phase != Phase::Gathering) {
            self.take_note(engine);
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Protocol>> {
        properties::of(self)
    }
}
