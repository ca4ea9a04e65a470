//! The rules of activation and views, in the abstract, and a model checker that tries every history within bounds: every
//! order of every step, with any message late or lost, any engine overtaken, frozen or dead, any agent down for a while.
//!
//! The rules, and where they are: choosing the history at activation, counting, views in force (`engine`); what can happen
//! and when (`actions`); what must hold (`properties`); which rules can be broken, and the bounds (`rules`). The quorums
//! are the product's own. Data are abstract: each write has a block of its own, so that a lost write, or one that shows
//! and should not, is seen. A lease is abstract, too: it ends where a member promises a higher epoch, as an engine that
//! activates waits for it.
//!
//! One space with everything in it would be too large; several, each with its own bounds, are searched to the end:
//!
//! * *takeovers*: three engines, a write, a view change, an agent's crash;
//! * *writes*: three engines, two writes, a view change;
//! * *a return*: two engines, two writes, a replica dropped and back;
//! * *two drops and a return*: two engines, a write, two replicas dropped, one back;
//! * *drops and a return over three engines*: the same without a write: the first record of each epoch is acknowledged like
//!   one.
//!
//! `NBDCAST_MODEL_DEEP=1` searches larger ones (minutes each, some GB of memory), among them four replicas.
//!
//! What the model leaves out: quorums that change with the policy between epochs, replicas that lose data, time.
//!
//! The rules are only worth what breaking them shows: for each rule that can be broken there is a test which demands that
//! the checker finds the history that goes wrong. `cargo test --test model -- --nocapture` prints these, and the sizes.

#![allow(unreachable_pub, reason = "the modules of one test are seen by that test alone")]

mod actions;
mod check;
mod engine;
mod properties;
mod record;
mod rules;
mod state;
mod trace;

use protocol::AckPolicy;

use crate::check::{assert_holds, find_counterexample};
use crate::rules::{Bounds, Protocol, Rules};

const POLICIES: [AckPolicy; 3] = [AckPolicy::First, AckPolicy::Majority, AckPolicy::All];

const SMALL: Bounds = Bounds { replicas: 3, engines: 2, writes: 1, drops: 0, rejoins: 0, crashes: 0 };

fn assert_holds_for_all_policies(name: &str, bounds: Bounds) {
    for policy in POLICIES {
        assert_holds(name, Protocol { policy, rules: Rules::AS_DESIGNED, bounds });
    }
}

#[test]
fn takeovers_lose_nothing() {
    let bounds = Bounds { engines: 3, drops: 1, crashes: 1, ..SMALL };
    assert_holds_for_all_policies("takeovers", bounds);
}

#[test]
fn two_writes_over_takeovers_are_kept_in_their_order() {
    assert_holds_for_all_policies("writes", Bounds { engines: 3, writes: 2, drops: 1, ..SMALL });
}

#[test]
fn a_replica_that_comes_back_shows_what_the_others_show() {
    assert_holds_for_all_policies("a return", Bounds { writes: 2, drops: 1, rejoins: 1, ..SMALL });
}

#[test]
fn views_shrink_twice_and_grow_again() {
    assert_holds_for_all_policies("two drops and a return", Bounds { drops: 2, rejoins: 1, ..SMALL });
}

#[test]
fn no_engine_is_misled_by_the_view_of_a_replica_that_was_on_its_way_back() {
    let bounds = Bounds { engines: 3, writes: 0, drops: 2, rejoins: 1, ..SMALL };
    assert_holds_for_all_policies("drops and a return over three engines", bounds);
}

#[test]
fn larger_bounds_hold_too_when_asked_for() {
    if std::env::var_os("NBDCAST_MODEL_DEEP").is_none() {
        return println!("larger bounds are searched with NBDCAST_MODEL_DEEP=1");
    }
    let larger = [
        ("a return with a crash", Bounds { writes: 2, drops: 1, rejoins: 1, crashes: 1, ..SMALL }),
        ("four replicas", Bounds { replicas: 4, engines: 3, writes: 0, drops: 2, ..SMALL }),
        ("two returns over three engines", Bounds { engines: 3, drops: 1, rejoins: 2, ..SMALL }),
        ("drops, a return and a write over three engines", Bounds { engines: 3, drops: 2, rejoins: 1, ..SMALL }),
        ("two writes and two drops", Bounds { engines: 3, writes: 2, drops: 2, ..SMALL }),
    ];
    for (name, bounds) in larger {
        assert_holds_for_all_policies(name, bounds);
    }
}

/// Demands that with these rules something goes wrong, and tells what.
fn assert_goes_wrong(policy: AckPolicy, rules: Rules, bounds: Bounds, property: &str) {
    let found = find_counterexample(Protocol { policy, rules, bounds }).expect("a history that goes wrong");
    println!("{policy:?}, {} steps\n{}", found.steps.len(), found.story());
    assert_eq!(found.property, property);
}

const DESIGNED: Rules = Rules::AS_DESIGNED;
const LOST: &str = "acknowledged records are in every later serving engine's history";
const OVERLOOKED: &str = "a view in force is never overlooked";
const STALE: &str = "a read shows all that is acknowledged";
const DIFFERENT: &str = "a replica that is not syncing shows exactly what its log says";

#[test]
fn an_activation_quorum_one_too_small_misses_writes_and_views() {
    let rules = Rules { activation_quorum: false, ..DESIGNED };
    assert_goes_wrong(AckPolicy::First, rules, SMALL, LOST);
    // Where an acknowledgement takes two, an engine with one replica chooses the wrong history, but cannot serve by it.
    for policy in [AckPolicy::Majority, AckPolicy::All] {
        assert_goes_wrong(policy, rules, Bounds { drops: 1, ..SMALL }, OVERLOOKED);
    }
}

#[test]
fn a_view_that_counts_as_soon_as_it_is_given_out_is_overlooked() {
    let rules = Rules { view_waits_for_quorum: false, ..DESIGNED };
    assert_goes_wrong(AckPolicy::Majority, rules, Bounds { drops: 1, ..SMALL }, STALE);
}

#[test]
fn a_promise_that_a_crash_forgets_lets_an_overtaken_engine_acknowledge() {
    let rules = Rules { promise_is_durable: false, ..DESIGNED };
    assert_goes_wrong(AckPolicy::First, rules, Bounds { crashes: 1, ..SMALL }, LOST);
}

#[test]
fn a_syncing_replica_names_a_view_that_nobody_else_holds() {
    let rules = Rules { syncing_is_left_out: false, ..DESIGNED };
    assert_goes_wrong(AckPolicy::First, rules, Bounds { drops: 2, rejoins: 1, ..SMALL }, OVERLOOKED);
}

#[test]
fn the_longest_log_is_not_the_true_one() {
    let rules = Rules { epoch_decides: false, ..DESIGNED };
    assert_goes_wrong(AckPolicy::Majority, rules, Bounds { engines: 3, writes: 2, drops: 1, ..SMALL }, OVERLOOKED);
}

#[test]
fn a_tail_dropped_before_it_is_on_record_shows_again() {
    let rules = Rules { begin_waits_for_follow: false, ..DESIGNED };
    let bounds = Bounds { engines: 3, drops: 1, rejoins: 2, ..SMALL };
    assert_goes_wrong(AckPolicy::Majority, rules, bounds, DIFFERENT);
}

/// A replica that is synced counts at activation. Had it a view change that no member has, a later engine would go by it.
#[test]
fn a_synced_replica_that_is_sent_another_view_change_names_it_alone() {
    let rules = Rules { synced_sees_only_its_add: false, ..DESIGNED };
    assert_goes_wrong(AckPolicy::First, rules, Bounds { drops: 2, rejoins: 1, ..SMALL }, OVERLOOKED);
}

/// An engine can be unaware of a view change that its predecessor gave out. If it changes the view before its own epoch
/// is on record, the two views need not have a member in common that would tell a third engine.
#[test]
fn a_view_changed_before_the_epoch_is_on_record_is_overlooked() {
    let rules = Rules { start_precedes_changes: false, ..DESIGNED };
    let added = Bounds { engines: 3, writes: 0, drops: 2, rejoins: 1, ..SMALL };
    assert_goes_wrong(AckPolicy::Majority, rules, added, OVERLOOKED);
    let dropped = Bounds { replicas: 4, engines: 3, writes: 0, drops: 2, ..SMALL };
    assert_goes_wrong(AckPolicy::Majority, rules, dropped, OVERLOOKED);
}

/// While a replica is being added, a quorum of the larger view can activate without the members that the lease counts.
#[test]
fn a_lease_of_the_old_view_alone_shows_stale_data() {
    let rules = Rules { lease_meets_both_views: false, ..DESIGNED };
    assert_goes_wrong(AckPolicy::Majority, rules, Bounds { drops: 1, rejoins: 1, ..SMALL }, STALE);
}
