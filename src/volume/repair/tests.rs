//! What is known of bad blocks, and what that leads to.

use super::known::{READING_MAX, UNDER_WAY_MAX};
use super::*;

fn finding(bad: PeerId, seen: u64) -> Finding {
    Finding {
        blocks: block_at(4096),
        bad,
        what: Damage::ChecksumMismatch,
        good: None,
        sound: Vec::new(),
        seen: Seq(seen),
    }
}

fn differs(block: u64, bad: PeerId, good: PeerId, seen: u64) -> Finding {
    let blocks = block_at(block);
    Finding { blocks, what: Damage::Differs, good: Some(good), ..finding(bad, seen) }
}

fn step(repairs: &Repairs) -> Option<Step> {
    repairs.blocks.get(&4096).map(|repair| repair.step)
}

#[test]
fn what_is_known_is_no_news_until_it_was_made_good() {
    let mut repairs = Repairs::default();
    assert!(repairs.note(4096, &finding(0, 10)) && !repairs.note(4096, &finding(0, 11)));
    assert!(repairs.note(4096, &finding(1, 11)), "at another member it is");
    repairs.overlap(block_at(4096), Seq(12));
    assert!(!repairs.note(4096, &finding(0, 11)), "it was found before");
    let durable = |peer| Seq(if peer == 0 { 12 } else { 11 });
    let healed = repairs.take_healed(|_| true, durable);
    assert_eq!(healed.iter().map(|h| (h.block, h.peer)).collect::<Vec<_>>(), [(4096, 0)]);
    assert_eq!(repairs.take_healed(|_| true, |_| Seq(12)).len(), 1);
    assert_eq!(step(&repairs), None);
    assert!(!repairs.note(4096, &finding(2, 11)), "the record made it good there too");
    assert!(repairs.note(4096, &finding(2, 12)), "this one was found behind the record");
}

#[test]
fn a_block_that_is_bad_again_after_its_record_is_repaired_again() {
    let mut repairs = Repairs::default();
    repairs.note(4096, &finding(0, 1));
    repairs.overlap(block_at(4096), Seq(2));
    assert!(repairs.note(4096, &finding(0, 2)));
    assert_eq!(step(&repairs), Some(Step::Seek));
}

#[test]
fn a_change_of_a_part_makes_nothing_good_and_what_was_read_before_useless() {
    let mut repairs = Repairs::default();
    repairs.note(4096, &finding(0, 1));
    let (_, repair) = repairs.blocks.first_key_value().map(|(b, r)| (*b, r)).unwrap();
    assert!(repair.may_read_at(1) && !repair.may_read_at(0));
    assert!(repairs.may_need(1) && !repairs.may_need(0));
    repairs.blocks.get_mut(&4096).unwrap().read.ask(7, Time::ZERO);
    repairs.overlap(ByteRange { offset: 4097, length: 8191 }, Seq(2));
    repairs.overlap(ByteRange { offset: 0, length: 4096 }, Seq(3));
    let (_, repair) = repairs.find_read(7).unwrap();
    assert!(!repair.read.finish(), "it is read again");
    assert_eq!(step(&repairs), Some(Step::Seek));
}

#[test]
fn of_more_than_are_bounded_nothing_is_kept_and_members_that_left_are_forgotten() {
    let mut repairs = Repairs::default();
    let taken = (0..1000).filter(|block| repairs.note(block * BLOCK_BYTES, &finding(0, 1))).count();
    assert_eq!(taken, UNDER_WAY_MAX);
    assert_eq!(repairs.unasked().len(), READING_MAX);
    assert!(repairs.take_healed(|_| false, |_| Seq(9)).is_empty());
    assert!(repairs.blocks.is_empty());
}

#[test]
fn a_block_that_differs_is_copied_from_the_member_that_is_named() {
    let mut repairs = Repairs::default();
    repairs.note(4096, &finding(0, 1));
    repairs.blocks.get_mut(&4096).unwrap().read.ask(7, Time::ZERO);
    repairs.note(4096, &Finding { what: Damage::Differs, good: Some(2), ..finding(1, 1) });
    assert!(repairs.find_read(7).is_none(), "what is read may be what differs");
    let repair = &repairs.blocks[&4096];
    assert_eq!([0, 1, 2, 3].map(|peer| repair.may_read_at(peer)), [false, false, true, false]);
}

#[test]
fn a_copy_that_is_found_good_again_is_copied_from() {
    let mut repairs = Repairs::default();
    (0..3).for_each(|bad| _ = repairs.note(4096, &finding(bad, 1)));
    let repair = repairs.blocks.get_mut(&4096).unwrap();
    repair.failed.push(3);
    repair.step = Step::Hopeless;
    assert!(!repairs.note(4096, &Finding { sound: vec![0, 3], ..finding(1, 2) }), "that it is bad is known");
    assert_eq!(step(&repairs), Some(Step::Seek));
    assert_eq!([0, 1, 2, 3].map(|peer| repairs.blocks[&4096].may_read_at(peer)), [true, false, false, true]);
    repairs.overlap(block_at(4096), Seq(3));
    repairs.note(4096, &Finding { sound: vec![1], ..finding(2, 2) });
    assert_eq!(step(&repairs), Some(Step::Given(Seq(3))), "the record is what makes it good");
}

#[test]
fn only_blocks_of_the_range_asked_for_are_believed_to_be_bad() {
    let range = ByteRange { offset: 5000, length: 4096 };
    let named = |offset| bad_block(&ReadOutcome::Unreadable { offset }, range).map(|(offset, _)| offset);
    assert_eq!([4096, 8192].map(named), [Some(4096), Some(8192)]);
    assert_eq!([0, 12_288, 5000, u64::MAX / 4096 * 4096].map(named), [None; 4]);
}

#[test]
fn a_tied_block_is_made_good_from_no_copy_until_it_is_known_which_is_right() {
    let seen_at = |seq| Finding { seen: Seq(seq), ..finding(2, seq) };
    let mut repairs = Repairs::default();
    repairs.note(4096, &seen_at(1));
    repairs.blocks.get_mut(&4096).unwrap().read.ask(7, Time::ZERO);
    repairs.tie(4096, vec![0, 1], Seq(2));
    assert!(repairs.find_read(7).is_none(), "what is read may be wrong");
    let hopeless = |repairs: &mut Repairs| repairs.blocks.get_mut(&4096).unwrap().step = Step::Hopeless;
    hopeless(&mut repairs);
    repairs.reconsider();
    repairs.note(4096, &Finding { sound: vec![0], ..seen_at(3) });
    assert_eq!(step(&repairs), Some(Step::Hopeless), "neither another view nor a sound copy says which is right");
    repairs.agreed(block_at(4096), Seq(1), |_| false);
    repairs.agreed(block_at(4096), Seq(4), |block| block == 4096);
    repairs.agreed(block_at(0), Seq(4), |_| false);
    assert_eq!(step(&repairs), Some(Step::Hopeless));
    repairs.agreed(block_at(4096), Seq(4), |_| false);
    assert_eq!(step(&repairs), Some(Step::Seek), "a later look");
    for end in [|r: &mut Repairs| r.give_up(1), |r: &mut Repairs| assert!(r.note(4096, &differs(4096, 0, 1, 5)))] {
        repairs.tie(4096, vec![0, 1], Seq(4));
        hopeless(&mut repairs);
        end(&mut repairs);
        assert_eq!(step(&repairs), Some(Step::Seek));
    }
}

#[test]
fn what_a_record_made_the_same_everywhere_is_no_tie() {
    let mut repairs = Repairs::default();
    repairs.note(4096, &finding(2, 1));
    repairs.overlap(block_at(4096), Seq(3));
    repairs.tie(4096, vec![0, 1], Seq(2));
    assert!(!repairs.ties.contains(4096), "members were asked before it");
    repairs.take_healed(|_| true, |_| Seq(3));
    repairs.tie(4096, vec![0, 1], Seq(2));
    assert!(!repairs.ties.contains(4096));
    repairs.tie(4096, vec![0, 1], Seq(3));
    assert!(repairs.ties.contains(4096));
    repairs.overlap(block_at(4096), Seq(4));
    assert!(!repairs.ties.contains(4096));
}

#[test]
fn who_was_right_and_was_given_up_is_not_copied_from() {
    for (sound, others) in [(vec![1, 2], vec![2]), (vec![], vec![])] {
        let mut repairs = Repairs::default();
        repairs.note(4096, &Finding { what: Damage::Differs, good: Some(1), sound, ..finding(0, 1) });
        repairs.take_healed(|peer| peer != 1, |_| Seq(1));
        assert!(repairs.blocks[&4096].may_read_at(1), "it left with the right copy, and nobody gives it a wrong one");
        repairs.give_up(1);
        let may_read_at = |repairs: &Repairs, peer| repairs.blocks[&4096].may_read_at(peer);
        assert_eq!((0..4).filter(|peer| may_read_at(&repairs, *peer)).collect::<Vec<_>>(), others);
        repairs.blocks.get_mut(&4096).unwrap().step = Step::Hopeless;
        repairs.note(4096, &Finding { what: Damage::Differs, good: Some(3), ..finding(0, 2) });
        assert_eq!(step(&repairs), Some(Step::Seek), "there is one that is right again");
        assert!(may_read_at(&repairs, 3) && !may_read_at(&repairs, 1));
    }
}

#[test]
fn after_a_record_that_made_a_block_good_any_member_may_have_the_good_copy() {
    let mut repairs = Repairs::default();
    repairs.note(4096, &Finding { what: Damage::Differs, good: Some(1), ..finding(0, 1) });
    repairs.overlap(block_at(4096), Seq(2));
    (0..2).for_each(|bad| _ = repairs.note(4096, &finding(bad, 2)));
    assert!(repairs.blocks[&4096].may_read_at(2));
}

#[test]
fn a_member_that_differs_is_known_until_a_read_comes_behind_the_record_that_makes_it_good() {
    let mut repairs = Repairs::default();
    repairs.note(4096, &finding(0, 1));
    let range = ByteRange { offset: 100, length: 4096 };
    assert!(!repairs.differs_at(0, range, Seq(9)), "it cannot answer a read of it anyway");
    repairs.note(4096, &differs(4096, 0, 2, 2));
    repairs.note(4096, &differs(4096, 1, 2, 2));
    let of = |repairs: &Repairs, peer, seen| repairs.differing(peer, range, Seq(seen)).collect::<Vec<_>>();
    assert_eq!((of(&repairs, 0, 9), of(&repairs, 1, 9), of(&repairs, 2, 9)), (vec![4096], vec![4096], vec![]));
    assert!(!repairs.differs_at(0, block_at(0), Seq(9)));
    assert_eq!(repairs.made_good_by(4096), None);
    repairs.overlap(block_at(4096), Seq(5));
    assert!(repairs.differs_at(0, range, Seq(4)) && !repairs.differs_at(0, range, Seq(5)));
    assert_eq!(repairs.made_good_by(4096), Some(Seq(5)));
    repairs.take_healed(|_| true, |_| Seq(5));
    assert_eq!((of(&repairs, 0, 4), repairs.made_good_by(4096)), (vec![], Some(Seq(5))));
}

#[test]
fn what_only_a_member_that_differs_has_is_lost_once_nobody_else_has_it() {
    let mut repairs = Repairs::default();
    repairs.note(4096, &differs(4096, 0, 2, 2));
    assert!(!repairs.is_lost_at(0, block_at(4096)), "it is being repaired");
    repairs.blocks.get_mut(&4096).unwrap().step = Step::Hopeless;
    assert!(repairs.is_lost_at(0, block_at(4096)) && !repairs.is_lost_at(1, block_at(4096)));
}

#[test]
fn a_status_ends_before_a_block_that_differs_or_behind_it() {
    let mut repairs = Repairs::default();
    repairs.note(0, &finding(0, 1));
    repairs.note(8192, &differs(8192, 0, 2, 2));
    let of = |repairs: &Repairs, offset, length| repairs.up_to_difference(ByteRange { offset, length }).length;
    assert_eq!((of(&repairs, 0, 1 << 40), of(&repairs, 8000, 8000), of(&repairs, 0, 8192)), (8192, 192, 8192));
    assert_eq!((of(&repairs, 8192, 1 << 40), of(&repairs, 9000, 8000), of(&repairs, 9000, 10)), (4096, 3288, 10));
    repairs.overlap(block_at(8192), Seq(5));
    assert_eq!(of(&repairs, 0, 1 << 40), 1 << 40);
}

#[test]
fn a_member_that_differs_may_leave_and_come_back_with_it() {
    let mut repairs = Repairs::default();
    repairs.note(4096, &differs(4096, 0, 2, 2));
    repairs.note(8192, &differs(8192, 0, 2, 2));
    repairs.note(8192, &finding(1, 2));
    assert!(repairs.take_healed(|_| false, |_| Seq(9)).is_empty());
    assert!([4096, 8192].into_iter().all(|block| repairs.differs_at(0, block_at(block), Seq(9))));
    assert!(!repairs.blocks[&8192].is_bad_at(1), "that it finds out by itself");
    repairs.overlap(block_at(4096), Seq(3));
    repairs.take_healed(|_| false, |_| Seq(2));
    assert!(!repairs.blocks.contains_key(&4096), "it gets the record before it is a member");
    repairs.give_up(0);
    repairs.take_healed(|_| false, |_| Seq(2));
    assert!(repairs.blocks.is_empty(), "all of it is copied anew");
}
