//! Names, identities and views: which replicas are members, and which view came before.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::REPLICAS_MAX;
use crate::position::Seq;

/// The name of a replica or a volume: 1 to 64 of `A-Z a-z 0-9 . _ -`, not starting with a dot. It is also the name of a
/// directory, so nothing else is let through.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ReplicaName(Arc<str>);

/// Why a text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a name: 1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot")]
pub struct NameError {
    /// The refused text.
    pub text: String,
}

impl ReplicaName {
    /// Bytes in a name at most.
    pub const BYTES_MAX: usize = 64;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `text` may be the name of a replica or of a volume.
    #[must_use]
    pub fn is_valid(text: &str) -> bool {
        (1..=Self::BYTES_MAX).contains(&text.len())
            && !text.starts_with('.')
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    }
}

impl FromStr for ReplicaName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if Self::is_valid(text) { Ok(ReplicaName(text.into())) } else { Err(NameError { text: text.into() }) }
    }
}

impl TryFrom<String> for ReplicaName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<ReplicaName> for String {
    fn from(name: ReplicaName) -> String {
        name.0.to_string()
    }
}

impl fmt::Display for ReplicaName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for ReplicaName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The identity of a volume, made once by `create`; all replicas of a volume carry the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct VolumeUuid(pub [u8; 16]);

impl fmt::Display for VolumeUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for VolumeUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The set of in-sync replicas, sorted by name.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct View {
    members: Vec<ReplicaName>,
}

impl View {
    /// A view of these replicas; `None` if there are none, too many, or one is named twice.
    #[must_use]
    pub fn new(mut members: Vec<ReplicaName>) -> Option<View> {
        members.sort();
        let unique = members.windows(2).all(|w| w[0] != w[1]);
        (unique && (1..=REPLICAS_MAX).contains(&members.len())).then_some(View { members })
    }

    /// The members, sorted by name.
    #[must_use]
    pub fn members(&self) -> &[ReplicaName] {
        &self.members
    }

    /// How many members there are; never zero.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a view is never empty")]
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether `name` is a member.
    #[must_use]
    pub fn contains(&self, name: &ReplicaName) -> bool {
        self.members.binary_search(name).is_ok()
    }

    /// This view and `name`; `None` if it is a member already, or the view would be too large.
    #[must_use]
    pub fn with(&self, name: &ReplicaName) -> Option<View> {
        View::new(self.members.iter().chain([name]).cloned().collect())
    }

    /// This view less `name`; `None` if nothing would be left.
    #[must_use]
    pub fn without(&self, name: &ReplicaName) -> Option<View> {
        View::new(self.members.iter().filter(|m| *m != name).cloned().collect())
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, member) in self.members.iter().enumerate() {
            write!(f, "{}{member}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}

/// What an agent knows of views: that of the latest view record in its journal, and the one before. The one before
/// matters at activation: the latest may not have come into force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ViewState {
    /// The view of the latest view record.
    pub view: View,
    /// The view before it; the same for a volume whose view never changed.
    pub previous: View,
    /// The place of the latest view record; zero if the view is that of `create`.
    pub seq: Seq,
}

impl ViewState {
    /// The state of a newly formatted volume.
    #[must_use]
    pub fn initial(view: View) -> ViewState {
        ViewState { previous: view.clone(), view, seq: Seq(0) }
    }

    /// Takes in the view record at `seq`. A forced one leaves nothing to go back to.
    pub fn change(&mut self, view: View, forced: bool, seq: Seq) {
        let before = std::mem::replace(&mut self.view, view);
        self.previous = if forced { self.view.clone() } else { before };
        self.seq = seq;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<ReplicaName> {
        names.iter().map(|n| n.parse().unwrap()).collect()
    }

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for bad in ["", ".", "..", ".a", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(bad.parse::<ReplicaName>().is_err(), "{bad:?}");
        }
        for good in ["a", "vol0", "A.b_c-9", &"x".repeat(64)] {
            assert!(good.parse::<ReplicaName>().is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_view_is_sorted_unique_and_never_empty() {
        assert_eq!(View::new(names(&["b", "a"])).unwrap().to_string(), "a, b");
        assert!(View::new(names(&["a", "a"])).is_none());
        assert!(View::new(vec![]).is_none());
        assert!(View::new(names(&["a"])).unwrap().without(&"a".parse().unwrap()).is_none());
    }
}
