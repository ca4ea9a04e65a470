//! Randomness of the tests: one seed per test, printed with the command that replays it. No other randomness is used.

use std::hash::{BuildHasher, Hasher, RandomState};

/// A small deterministic generator (splitmix64). Clones continue independently from the same place.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number in `0..end`; `end` must not be 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// A generator for another actor of the same test.
    pub fn fork(&mut self) -> Self {
        Self(self.next())
    }

    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// The seed of the test named `test` (its path as libtest shows it), printed with the command that replays it.
pub fn of_test(test: &str) -> (u64, Rng) {
    let seed = match std::env::var("NBDCAST_TEST_SEED") {
        Ok(text) => text.parse().expect("NBDCAST_TEST_SEED is not an unsigned number"),
        Err(_) => RandomState::new().build_hasher().finish() >> 16,
    };
    println!("replay: NBDCAST_TEST_SEED={seed} cargo test --test e2e -- --exact {test} --nocapture");
    (seed, Rng::new(seed))
}

/// How many rounds of a random test to run: all of them, or a tenth in quick mode.
pub fn rounds(full: u64) -> u64 {
    if quick() { full.div_ceil(10) } else { full }
}

pub fn quick() -> bool {
    std::env::var_os("NBDCAST_TEST_QUICK").is_some_and(|value| value == "1")
}

/// Whether stories that go on for a time go on for minutes.
pub fn long() -> bool {
    std::env::var_os("NBDCAST_TEST_LONG").is_some_and(|value| value == "1")
}
