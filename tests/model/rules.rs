//! What a run of the checker goes by: the ack policy, the rules (those of the design, or with one of them broken), and the
//! bounds within which everything that can happen is tried.

use protocol::AckPolicy;

/// The rules that can be broken, to show that the checker would notice. True is as designed.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Qa(V) members of the view must have answered; broken: one less is enough.
    pub activation_quorum: bool,
    /// A view change counts once Qd members of the old view hold it; broken: as soon as it is given out.
    pub view_waits_for_quorum: bool,
    /// A promise is on disk before it is answered; broken: a crash forgets it.
    pub promise_is_durable: bool,
    /// Replicas that are syncing do not count at activation; broken: they do.
    pub syncing_is_left_out: bool,
    /// Positions are compared by epoch first; broken: by seq alone.
    pub epoch_decides: bool,
    /// A returning replica drops its tail once Qd members hold the record that names it; broken: at once.
    pub begin_waits_for_follow: bool,
    /// An engine changes the view only once the first record of its epoch is durable on enough members of the view in
    /// force; broken: as soon as it has chosen.
    pub start_precedes_changes: bool,
    /// Between telling a replica that it is synced and adding it, it is sent no other view change; broken: it is.
    pub synced_sees_only_its_add: bool,
    /// While a view change is pending, a lease needs Qd members of either view; broken: of the view in force alone.
    pub lease_meets_both_views: bool,
}

impl Rules {
    pub const AS_DESIGNED: Rules = Rules {
        activation_quorum: true,
        view_waits_for_quorum: true,
        promise_is_durable: true,
        syncing_is_left_out: true,
        epoch_decides: true,
        begin_waits_for_follow: true,
        start_precedes_changes: true,
        synced_sees_only_its_add: true,
        lease_meets_both_views: true,
    };
}

/// How much may happen in one history. All counts are for the volume as a whole.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Replicas, at most four.
    pub replicas: usize,
    /// Epochs: the engine of epoch 1 serves at the beginning, the others activate.
    pub engines: usize,
    /// Writes, of whatever engine.
    pub writes: u8,
    /// View changes that drop a replica. The first to be dropped is the last replica: they are alike, so it
    /// stands for any of them.
    pub drops: u8,
    /// Times that a dropped replica starts to come back.
    pub rejoins: u8,
    /// Crashes of an agent. It comes up again, at any time later or never.
    pub crashes: u8,
}

/// A model: what the checker explores.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    pub policy: AckPolicy,
    pub rules: Rules,
    pub bounds: Bounds,
}
