//! What a volume may hold after a crash: for every block the last answered write, or one issued after it, nothing else.
//!
//! Every written block carries its block number, the number of its write and the test's seed, and is filled from the
//! three, so that a mixed-up, torn or stale block is seen as what it is. Write numbers rise in the order of issue, and a
//! block is only ever written over one connection, where order of issue is the volume's order.

use std::fmt;

pub const BLOCK: usize = 4096;
const MAGIC: u64 = 0x6e62_6463_6173_7421;

/// What one block holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// All zeroes: never written, trimmed or zeroed.
    Zero,
    /// The block of the write with this number.
    Written(u64),
}

impl fmt::Debug for Content {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => write!(out, "zeroes"),
            Self::Written(number) => write!(out, "write {number}"),
        }
    }
}

/// A change that was issued; `number` is its place in the order of issue.
#[derive(Clone, Copy, Debug)]
struct Change {
    number: u64,
    content: Content,
}

#[derive(Clone, Debug)]
struct Block {
    /// The last answered change, which the volume must not forget.
    settled: Change,
    /// Changes issued after it, in order, not answered.
    open: Vec<Change>,
}

/// The memory of a test about one volume.
pub struct Ledger {
    seed: u64,
    blocks: Vec<Block>,
    last_number: u64,
}

impl Ledger {
    /// For a fresh volume (all zeroes) of `size` bytes.
    pub fn new(seed: u64, size: u64) -> Self {
        let fresh = Block { settled: Change { number: 0, content: Content::Zero }, open: Vec::new() };
        Self { seed, blocks: vec![fresh; size as usize / BLOCK], last_number: 0 }
    }

    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Notes that a write (or with `zero` a trim or zeroing) of `count` blocks is about to be sent; returns its number.
    pub fn issue(&mut self, first: u64, count: u64, zero: bool) -> u64 {
        self.last_number += 1;
        let number = self.last_number;
        let content = if zero { Content::Zero } else { Content::Written(number) };
        for block in &mut self.blocks[first as usize..(first + count) as usize] {
            block.open.push(Change { number, content });
        }
        number
    }

    /// A number for a request that changes nothing, a flush.
    pub fn issue_nothing(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Notes that the change `number` was answered: whatever was issued before it can no longer be there.
    pub fn answer(&mut self, number: u64, first: u64, count: u64) {
        for block in &mut self.blocks[first as usize..(first + count) as usize] {
            let answered = block.open.iter().find(|change| change.number == number);
            if let Some(answered) = answered.copied() {
                block.settled = answered;
                block.open.retain(|change| change.number > number);
            }
        }
    }

    /// The payload of write `number` at `count` blocks from `first`.
    pub fn payload(&self, number: u64, first: u64, count: u64) -> Vec<u8> {
        let mut payload = vec![0; count as usize * BLOCK];
        for (index, chunk) in (first..).zip(payload.chunks_exact_mut(BLOCK)) {
            fill(chunk, self.seed, index, number);
        }
        payload
    }

    /// Checks the volume's content after a crash. What is found is from then on the answered content: a crash may
    /// choose the fate of an unanswered write, but only once.
    pub fn settle(&mut self, content: &[u8]) -> Result<(), String> {
        assert_eq!(content.len(), self.blocks.len() * BLOCK, "size of the volume");
        let seed = self.seed;
        let mut wrong = Vec::new();
        for (index, (block, found)) in (0_u64..).zip(self.blocks.iter_mut().zip(content.chunks_exact(BLOCK))) {
            let allowed = std::iter::once(&block.settled).chain(&block.open);
            let matching = allowed.rev().find(|change| holds(found, seed, index, change.content));
            match matching.copied() {
                Some(change) => {
                    block.settled = change;
                    block.open.clear();
                }
                None => wrong.push(describe(found, seed, index, block)),
            }
        }
        report(&wrong)
    }
}

fn report(wrong: &[String]) -> Result<(), String> {
    if wrong.is_empty() {
        return Ok(());
    }
    let shown = wrong.iter().take(10).cloned().collect::<Vec<_>>().join("\n  ");
    Err(format!("{} blocks are wrong, the first:\n  {shown}", wrong.len()))
}

/// The content of one written block: a header that names it, then a stream that only this seed, block and write give.
fn fill(chunk: &mut [u8], seed: u64, block: u64, number: u64) {
    let mut state = seed ^ block.rotate_left(24) ^ number.rotate_left(48) ^ MAGIC;
    for word in chunk[32..].chunks_exact_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(block | 1);
        word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    for (word, value) in chunk.chunks_exact_mut(8).zip([MAGIC, block, number, seed]) {
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn holds(found: &[u8], seed: u64, block: u64, content: Content) -> bool {
    let mut expected = [0; BLOCK];
    match content {
        Content::Zero => {}
        Content::Written(number) => fill(&mut expected, seed, block, number),
    }
    found == expected
}

fn describe(found: &[u8], seed: u64, index: u64, block: &Block) -> String {
    let word = |at: usize| {
        let bytes: [u8; 8] = found[at * 8..at * 8 + 8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes)
    };
    let kind = if found.iter().all(|byte| *byte == 0) {
        "zeroes".to_string()
    } else if word(0) != MAGIC {
        format!("bytes of no write ({:#018x}…)", word(0))
    } else {
        let (at, number, from) = (word(1), word(2), word(3));
        let whole = holds(found, from, at, Content::Written(number));
        let torn = if whole { "" } else { ", torn" };
        let other = if from == seed { "" } else { ", of another seed" };
        format!("write {number} of block {at}{torn}{other}")
    };
    let open: Vec<Content> = block.open.iter().map(|change| change.content).collect();
    format!(
        "block {index} holds {kind}; last answered: {:?} (number {}), issued later: {open:?}",
        block.settled.content, block.settled.number
    )
}

/// The oracle itself must be able to fail.
#[test]
fn the_ledger_tells_lost_stale_torn_and_misplaced_blocks() {
    let mut ledger = Ledger::new(7, 4 * BLOCK as u64);
    let first = ledger.issue(0, 2, false);
    ledger.answer(first, 0, 2);
    let second = ledger.issue(0, 1, false);
    let old = ledger.payload(first, 0, 2);
    let new = ledger.payload(second, 0, 1);
    let zero = vec![0; BLOCK];
    let volume = |blocks: [&[u8]; 4]| blocks.concat();
    let check = |content: Vec<u8>| {
        let mut copy = Ledger { seed: ledger.seed, blocks: ledger.blocks.clone(), last_number: ledger.last_number };
        copy.settle(&content)
    };

    check(volume([&old[..BLOCK], &old[BLOCK..], &zero, &zero])).expect("the open write may be lost");
    check(volume([&new, &old[BLOCK..], &zero, &zero])).expect("the open write may be there");
    check(volume([&zero, &old[BLOCK..], &zero, &zero])).expect_err("an answered write is lost");
    check(volume([&new, &new, &zero, &zero])).expect_err("a block is misplaced");
    let torn = [&new[..512], &old[512..BLOCK]].concat();
    check(volume([&torn, &old[BLOCK..], &zero, &zero])).expect_err("a block is torn");

    ledger.answer(second, 0, 1);
    ledger.settle(&volume([&old[..BLOCK], &old[BLOCK..], &zero, &zero])).expect_err("a block is stale");
}
