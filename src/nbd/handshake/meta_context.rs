//! What LIST_META_CONTEXT and SET_META_CONTEXT ask for: which export, and whether for `base:allocation`, the one
//! metadata context there is.
//!
//! Owns the syntax and the limits. Queries are looked at where they lie; nothing is allocated for them.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::super::constants::*;
use super::answer::Refusal;

/// What one of the two options carries.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ContextQuery<'a> {
    /// Name of the export.
    pub(super) export: &'a [u8],
    /// Whether there were no queries at all.
    pub(super) is_empty: bool,
    /// Whether `base:allocation` was asked for by its name.
    pub(super) names_allocation: bool,
    /// Whether everything in `base:` was asked for.
    pub(super) names_all: bool,
}

impl ContextQuery<'_> {
    /// Whether a LIST finds the context.
    pub(super) fn lists_allocation(&self) -> bool {
        self.is_empty || self.names_all || self.names_allocation
    }

    /// Whether a SET chooses it: wildcards choose nothing.
    pub(super) fn chooses_allocation(&self) -> bool {
        self.names_allocation
    }
}

const MALFORMED: Refusal = (REP_ERR_INVALID, "the option's lengths do not fit its data");

/// Takes the option's data apart. Queries for what is not known, of whatever namespace, are passed over.
pub(super) fn parse(data: &[u8]) -> Result<ContextQuery<'_>, Refusal> {
    let (export, rest) = split_string(data).ok_or(MALFORMED)?;
    let (count, mut rest) = rest.split_first_chunk::<4>().ok_or(MALFORMED)?;
    let count = u32::from_be_bytes(*count);
    if export.len() > STRING_BYTES_MAX {
        return Err((REP_ERR_TOO_BIG, "the export name is too long"));
    }
    if u64::from(count) * 4 > rest.len() as u64 {
        return Err(MALFORMED);
    }
    if count > META_QUERIES_MAX {
        return Err((REP_ERR_TOO_BIG, "too many queries"));
    }
    let mut query = ContextQuery { export, is_empty: count == 0, names_allocation: false, names_all: false };
    for _ in 0..count {
        let (name, behind) = split_string(rest).ok_or(MALFORMED)?;
        if name.len() > STRING_BYTES_MAX {
            return Err((REP_ERR_TOO_BIG, "a query is too long"));
        }
        query.names_allocation |= name == CONTEXT_ALLOCATION.as_bytes();
        query.names_all |= name == CONTEXT_BASE_ALL.as_bytes();
        rest = behind;
    }
    if rest.is_empty() { Ok(query) } else { Err(MALFORMED) }
}

/// A string behind its 32-bit length, and what follows it.
fn split_string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_be_bytes(*length) as usize)
}
