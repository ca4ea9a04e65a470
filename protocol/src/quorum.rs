//! Ack policies and the quorums that follow from them (DESIGN section 5, a rule: change it only with a model that shows
//! why). With V members and W of them needed for an acknowledgement:
//!
//! * `activation`: so many members must answer before an engine may activate. They meet every set of W members, so the
//!   most advanced of them holds every acknowledged record.
//! * `view_change`: on so many members a view record must be durable before it is in force. They meet every activation
//!   quorum, so no later engine can overlook the change.

use bytes::{BufMut, Bytes};
use serde::{Deserialize, Serialize};

use crate::cursor::{Malformed, Reader};

/// How many members must hold a record durably before the client is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AckPolicy {
    /// Any one member.
    #[default]
    First,
    /// More than half of the members.
    Majority,
    /// Every member.
    All,
}

impl AckPolicy {
    /// W(V): members that must hold a record, in a view of `members`.
    #[must_use]
    pub fn needed(self, members: usize) -> usize {
        match self {
            AckPolicy::First => 1,
            AckPolicy::Majority => members / 2 + 1,
            AckPolicy::All => members,
        }
    }

    /// Qa(V): members that must answer before an engine may activate. The write policy counts, as it is what every
    /// acknowledgement meets at least.
    #[must_use]
    pub fn activation(self, members: usize) -> usize {
        (members - self.needed(members) + 1).max(members / 2 + 1)
    }

    /// Qd(V): members on which a view change must be durable before it is in force.
    #[must_use]
    pub fn view_change(self, members: usize) -> usize {
        members - self.activation(members) + 1
    }

    /// The weaker of two policies: the one whose acknowledgements fewer members hold. Quorums must meet even these.
    #[must_use]
    pub fn weaker(self, other: AckPolicy) -> AckPolicy {
        let rank = |p| match p {
            AckPolicy::First => 0,
            AckPolicy::Majority => 1,
            AckPolicy::All => 2,
        };
        if rank(self) <= rank(other) { self } else { other }
    }
}

/// The policies that an epoch serves by. They are part of its first record: what may have been acknowledged depends on
/// them, so the next activation must go by these and not by a configuration that was changed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct AckPolicies {
    /// For changes.
    pub write: AckPolicy,
    /// For flushes, and changes with FUA.
    pub flush: AckPolicy,
}

impl AckPolicies {
    /// The policy that quorums are computed from: the weaker of the two.
    #[must_use]
    pub fn quorum(self) -> AckPolicy {
        self.write.weaker(self.flush)
    }

    /// The payload of an epoch's first record.
    #[must_use]
    pub fn encode(self) -> Bytes {
        let mut out = Vec::with_capacity(2);
        Self::encode_known(Some(self), &mut out);
        out.into()
    }

    /// Reads the payload of an epoch's first record.
    pub fn decode(payload: &[u8]) -> Result<AckPolicies, Malformed> {
        let mut reader = Reader::new(payload);
        let policies = Self::decode_known(&mut reader)?;
        reader.finish("ack policies")?;
        policies.ok_or(Malformed { field: "ack policies" })
    }

    /// Appends policies that may not be known, two bytes: 0 unknown, 1 first, 2 majority, 3 all.
    pub fn encode_known(policies: Option<AckPolicies>, out: &mut impl BufMut) {
        let number = |policy| match policy {
            AckPolicy::First => 1,
            AckPolicy::Majority => 2,
            AckPolicy::All => 3,
        };
        out.put_u8(policies.map_or(0, |p| number(p.write)));
        out.put_u8(policies.map_or(0, |p| number(p.flush)));
    }

    /// Reads what [`AckPolicies::encode_known`] wrote.
    pub fn decode_known(reader: &mut Reader<'_>) -> Result<Option<AckPolicies>, Malformed> {
        let mut policy = || match reader.u8("ack policy")? {
            0 => Ok(None),
            1 => Ok(Some(AckPolicy::First)),
            2 => Ok(Some(AckPolicy::Majority)),
            3 => Ok(Some(AckPolicy::All)),
            4..=u8::MAX => Err(Malformed { field: "ack policy" }),
        };
        match (policy()?, policy()?) {
            (Some(write), Some(flush)) => Ok(Some(AckPolicies { write, flush })),
            (None, None) => Ok(None),
            (Some(_), None) | (None, Some(_)) => Err(Malformed { field: "ack policies" }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICIES: [AckPolicy; 3] = [AckPolicy::First, AckPolicy::Majority, AckPolicy::All];

    #[test]
    fn every_activation_quorum_meets_every_acknowledgement_and_every_view_change() {
        for policy in POLICIES {
            for n in 1..=16 {
                let (w, qa, qd) = (policy.needed(n), policy.activation(n), policy.view_change(n));
                assert!(w + qa > n, "{policy:?} of {n}: an acknowledged record could be missed");
                assert!(qd + qa > n, "{policy:?} of {n}: a view change could be missed");
                assert!(2 * qa > n, "{policy:?} of {n}: two engines could activate at once");
                assert!((1..=n).contains(&qa) && (1..=n).contains(&qd));
            }
        }
    }

    #[test]
    fn policies_survive_the_trip_and_anything_else_is_refused() {
        for write in POLICIES {
            for flush in POLICIES {
                let policies = AckPolicies { write, flush };
                assert_eq!(AckPolicies::decode(&policies.encode()), Ok(policies));
            }
        }
        for bad in [&[0, 0][..], &[1, 0], &[4, 1], &[1], &[1, 1, 1]] {
            assert!(AckPolicies::decode(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_quorums_of_three() {
        let row = |p: AckPolicy| (p.needed(3), p.activation(3), p.view_change(3));
        assert_eq!(row(AckPolicy::First), (1, 3, 1));
        assert_eq!(row(AckPolicy::Majority), (2, 2, 2));
        assert_eq!(row(AckPolicy::All), (3, 2, 2));
    }
}
