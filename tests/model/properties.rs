//! What must hold at every moment of every history, and what must happen in some history for the rest to mean anything.

use stateright::Property;

use crate::record::{Members, Op};
use crate::rules::Protocol;
use crate::state::{Engine, Phase, State};

/// The properties of a model: those that must hold always, and the examples that its bounds must make possible.
pub fn of(protocol: &Protocol) -> Vec<Property<Protocol>> {
    let mut all = vec![
        Property::always("acknowledged records are in every later serving engine's history", nothing_is_lost),
        Property::always("no two records are acknowledged at one place", one_record_at_one_place),
        Property::always("an overtaken engine acknowledges nothing where a later one does", places_are_fenced),
        Property::always("a view in force is never overlooked", no_view_is_overlooked),
        Property::always("a read shows all that is acknowledged", reads_are_fresh),
        Property::always("a replica that is not syncing shows exactly what its log says", images_match_logs),
        Property::sometimes("a second engine serves", a_second_engine_serves),
    ];
    let bounds = protocol.bounds;
    if bounds.writes > 0 {
        all.push(Property::sometimes("an acknowledged write outlives its engine", a_write_outlives_its_engine));
        all.push(Property::sometimes("an overtaken engine still writes", an_overtaken_engine_writes));
    }
    if bounds.crashes > 0 {
        all.push(Property::sometimes("an acknowledged write outlives a crash of a replica", a_write_outlives_a_crash));
    }
    if bounds.drops > 0 {
        all.push(Property::sometimes("a view change comes into force", a_view_change_is_in_force));
        all.push(Property::sometimes("a view change is found and not yet in force", a_change_is_found_pending));
    }
    if bounds.rejoins > 0 {
        all.push(Property::sometimes("a replica that came back is a member again", a_replica_is_back));
    }
    all
}

/// Pairs of engines that have chosen a history, the one with the lower epoch first.
fn pairs(state: &State) -> impl Iterator<Item = (&Engine, &Engine)> {
    let started = |engine: &&Engine| engine.phase != Phase::Gathering;
    let earlier = state.engines.iter().enumerate().filter(move |(_, engine)| started(engine));
    earlier.flat_map(move |(i, first)| state.engines[i + 1..].iter().filter(started).map(move |later| (first, later)))
}

fn serves(engine: &Engine) -> bool {
    engine.phase == Phase::Serving
}

/// Checked at every moment, so also for what an earlier engine acknowledges when the later one serves already.
fn nothing_is_lost(_: &Protocol, state: &State) -> bool {
    pairs(state)
        .filter(|(_, later)| serves(later))
        .all(|(first, later)| later.order.records.starts_with(first.acknowledged()))
}

fn one_record_at_one_place(_: &Protocol, state: &State) -> bool {
    pairs(state).all(|(first, later)| {
        let (a, b) = (first.acknowledged(), later.acknowledged());
        a.starts_with(b) || b.starts_with(a)
    })
}

fn places_are_fenced(_: &Protocol, state: &State) -> bool {
    let starts = |engine: &Engine| engine.start_at().unwrap_or(usize::MAX);
    pairs(state).filter(|(_, later)| serves(later)).all(|(first, later)| first.committed <= starts(later))
}

/// A view change is in force when Qd members of the view before hold it, whether or not its engine knows. One that was
/// found at activation is in force again when they hold the first record of that epoch, too.
fn no_view_is_overlooked(protocol: &Protocol, state: &State) -> bool {
    pairs(state).all(|(first, later)| {
        first.order.changes().all(|change| {
            let held = change.at.max(first.start_at().unwrap_or(change.at)) + 1;
            let in_force = first.holding(change.old, held) >= protocol.policy.view_change(change.old.len());
            !in_force || first.order.records.get(change.at) == later.order.records.get(change.at)
        })
    })
}

/// A read is queued at a member behind everything given out, and answered while Qd members confirm the epoch. An engine
/// that activates waits until no earlier lease runs, so here a lease ends where a member promises a higher epoch.
fn reads_are_fresh(protocol: &Protocol, state: &State) -> bool {
    let has_lease = |engine: &Engine| {
        let confirms = |r: &usize| state.replicas[*r].promised == engine.epoch && engine.durable[*r].is_some();
        let quorum_of = |view: Members, counted: Members| {
            counted.iter().filter(confirms).count() >= protocol.policy.view_change(view.len())
        };
        let target = engine.order.view();
        let also = !engine.pending || !protocol.rules.lease_meets_both_views || quorum_of(target, target);
        also && quorum_of(engine.in_force(), engine.staying())
    };
    let readers = state.engines.iter().filter(|engine| serves(engine) && has_lease(engine));
    readers.into_iter().all(|reader| state.engines.iter().all(|e| reader.order.records.starts_with(e.acknowledged())))
}

fn images_match_logs(_: &Protocol, state: &State) -> bool {
    state.replicas.iter().all(|replica| replica.syncing || replica.image == replica.log.blocks_after(0))
}

fn a_second_engine_serves(_: &Protocol, state: &State) -> bool {
    state.engines[1..].iter().any(serves)
}

fn has_write(engine: &Engine) -> bool {
    engine.acknowledged().iter().any(|record| record.epoch == engine.epoch && matches!(record.op, Op::Write(_)))
}

fn a_write_outlives_its_engine(_: &Protocol, state: &State) -> bool {
    pairs(state).any(|(first, later)| serves(later) && has_write(first))
}

fn a_write_outlives_a_crash(protocol: &Protocol, state: &State) -> bool {
    state.used.crashes > 0 && a_write_outlives_its_engine(protocol, state)
}

fn an_overtaken_engine_writes(_: &Protocol, state: &State) -> bool {
    pairs(state).any(|(first, later)| {
        serves(later)
            && first.order.records.iter().any(|r| matches!(r.op, Op::Write(_)) && !later.order.records.contains(r))
    })
}

fn a_view_change_is_in_force(_: &Protocol, state: &State) -> bool {
    state.engines.iter().any(|engine| serves(engine) && engine.in_force() != engine.order.created)
}

fn a_change_is_found_pending(_: &Protocol, state: &State) -> bool {
    state.engines[1..]
        .iter()
        .any(|engine| engine.pending && engine.order.changes().last().map(|change| change.at) < engine.start_at())
}

fn a_replica_is_back(_: &Protocol, state: &State) -> bool {
    state.engines.iter().any(|engine| {
        let back = engine.order.changes().last().is_some_and(|change| change.new.len() > change.old.len());
        serves(engine) && back && !engine.pending
    })
}
