//! The rules that an engine goes by: choosing the history, counting, when a view is in force. The quorums are those of the
//! product (`protocol::AckPolicy`), so that a change there is checked here.

use protocol::AckPolicy;

use crate::record::{Log, Members, Op, REPLICAS_MAX, Record};
use crate::rules::Protocol;
use crate::state::{Answer, Engine, Phase};

impl Protocol {
    /// Qa(V), unless that rule is broken.
    fn activation_quorum(&self, view: Members) -> usize {
        let needed = self.policy.activation(view.len());
        if self.rules.activation_quorum { needed } else { needed - 1 }
    }

    /// The history that an engine goes on from, if enough has answered, and the replicas that can take part in it.
    ///
    /// Of the answers that count the highest position names the view; enough of its members must have answered; the
    /// highest of these is the source. Members whose log is a prefix of the source's get what they lack.
    fn choice(&self, engine: &Engine) -> Option<(Log, Vec<usize>)> {
        let counts = |answer: &Answer| !(answer.syncing && self.rules.syncing_is_left_out);
        let rank = |answer: &Answer| {
            let (epoch, seq) = answer.log.position();
            if self.rules.epoch_decides { (epoch, seq) } else { (0, seq) }
        };
        let answers = || engine.answers.iter().enumerate().filter_map(|(r, a)| Some((r, a.as_ref()?)));
        let top = answers().map(|(_, answer)| answer).filter(|a| counts(a)).max_by_key(|a| rank(a))?;
        let view = top.log.view();
        let members = || answers().filter(|(replica, answer)| view.contains(*replica) && counts(answer));
        if members().count() < self.activation_quorum(view) {
            return None;
        }
        let source = members().map(|(_, answer)| answer).max_by_key(|a| rank(a))?;
        let taking_part = members().filter(|(_, a)| a.log.is_prefix_of(&source.log)).map(|(replica, _)| replica);
        Some((source.log.clone(), taking_part.collect()))
    }

    pub fn can_choose(&self, engine: &Engine) -> bool {
        self.choice(engine).is_some()
    }

    /// Chooses the history and gives out the first record of the epoch. If the latest view change of the history has a
    /// predecessor it may not have come into force, and is pending.
    pub fn choose(&self, engine: &mut Engine) {
        let Some((order, taking_part)) = self.choice(engine) else { return };
        for replica in taking_part {
            engine.durable[replica] = engine.answers[replica].as_ref().map(|answer| answer.log.len());
        }
        engine.order = order;
        engine.pending = engine.order.changes().last().is_some();
        engine.phase = Phase::Starting;
        engine.answers = [const { None }; REPLICAS_MAX];
        self.give_out(engine, Op::Start);
    }

    /// Gives a record its place. With that it is in the queue to every replica that is being sent records.
    pub fn give_out(&self, engine: &mut Engine, op: Op) {
        engine.order.records.push(Record { epoch: engine.epoch, op });
    }

    /// Whether the members of the old view hold the pending change, so that no later engine can overlook it.
    pub fn may_come_into_force(&self, engine: &Engine) -> bool {
        let Some(change) = engine.order.changes().last() else { return false };
        engine.pending && engine.holding(change.old, change.at + 1) >= self.policy.view_change(change.old.len())
    }

    /// Whether an engine may give out view changes of its own: the first record of its epoch is durable on W members of
    /// the view in force, or on more than half of them. That many meet every activation by a view that an earlier engine
    /// gave out and that this one has not seen, so such an activation finds this epoch and not the unseen change.
    pub fn may_change_view(&self, engine: &Engine) -> bool {
        let view = engine.in_force();
        let needed = self.policy.weaker(AckPolicy::Majority).needed(view.len());
        let started = engine.start_at().is_some_and(|start| engine.holding(view, start + 1) >= needed);
        !engine.pending && (started || !self.rules.start_precedes_changes)
    }

    /// How many records W members of `view` hold.
    fn counted(&self, engine: &Engine, view: Members) -> usize {
        let mut durable: Vec<usize> = view.iter().map(|replica| engine.durable[replica].unwrap_or(0)).collect();
        durable.sort_unstable_by(|a, b| b.cmp(a));
        durable[self.policy.needed(view.len()) - 1]
    }

    /// Takes note of what became durable: serving begins, and acknowledgements are given, as early as they may be. An
    /// engine that does so later has acknowledged less, which asks less of the others.
    pub fn take_note(&self, engine: &mut Engine) {
        let in_force = self.counted(engine, engine.in_force());
        if engine.phase == Phase::Starting && engine.start_at().is_some_and(|start| in_force > start) {
            engine.phase = Phase::Serving;
        }
        if engine.phase == Phase::Serving {
            // Of two pieces of news, that of the view in force may come second: what precedes the change may have been
            // acknowledged by the old view still.
            let last = engine.order.changes().last().filter(|_| !engine.pending);
            let before = last.map_or(0, |change| self.counted(engine, change.old).min(change.at));
            engine.committed = engine.committed.max(in_force).max(before);
        }
    }
}
