//! What comes in: payloads in pieces, reading ahead and its bounds.

use super::*;
use std::task::Poll;

use crate::nbd::budget::Budget;
use crate::nbd::stream::Stream;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

const PATIENCE: Duration = Duration::from_secs(10);
/// More than is read ahead.
const MUCH: usize = 48 << 20;

fn intake() -> (Intake, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (read, _write) = Stream::Unix(ours).split();
    (Intake::new(read, b"ab", Budget::new(1, 1).loan()), theirs)
}

#[tokio::test]
async fn a_payload_that_has_to_be_waited_for_is_put_together() {
    for length in [4096, SMALL_PAYLOAD_BYTES_MAX + 1000] {
        let (mut intake, mut peer) = intake();
        let sent = vec![b'x'; length - 2];
        let (first, second) = sent.split_at(length / 2);
        peer.write_all(first).await.unwrap();
        let mut reading = pin!(intake.read_payload(length, PATIENCE));
        let complete = poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx).is_ready())).await;
        assert!(!complete);
        peer.write_all(second).await.unwrap();
        let data = reading.await.unwrap();
        assert_eq!(data[..2], *b"ab");
        assert_eq!(data[2..], sent);
    }
}

#[tokio::test]
async fn a_payload_that_is_here_is_taken_and_what_follows_stays() {
    let (mut intake, mut peer) = intake();
    peer.write_all(b"cdefgh").await.unwrap();
    assert_eq!(intake.fill().await.unwrap(), Fill::Read);
    assert_eq!(intake.read_payload(5, PATIENCE).await.unwrap(), b"abcde"[..]);
    assert_eq!(intake.take::<3>(), Some(*b"fgh"));
    assert_eq!(intake.take::<1>(), None);
}

#[tokio::test]
async fn a_payload_cut_short_is_an_error() {
    let (mut intake, peer) = intake();
    drop(peer);
    let error = intake.read_payload(5, PATIENCE).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

fn patterned(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 3 + at / 4096) as u8).collect()
}

/// Reads ahead to the end of `length` bytes, then takes them all in payloads of several sizes.
async fn read_ahead_and_take(length: usize) {
    let (mut intake, mut peer) = intake();
    let sent = patterned(length);
    let expected = [b"ab".as_slice(), &sent].concat();
    let sending = tokio::spawn(async move { peer.write_all(&sent).await });
    intake.read_ahead_to_silence().await;
    assert!(intake.has_ended());
    sending.await.unwrap().unwrap();
    let mut taken = BytesMut::new();
    for size in [1, 28, 4096, 300_000, SMALL_PAYLOAD_BYTES_MAX].into_iter().cycle() {
        let size = size.min(expected.len() - taken.len());
        if size == 0 {
            break;
        }
        taken.extend_from_slice(&intake.read_payload(size, PATIENCE).await.unwrap());
    }
    assert!(taken == expected);
    assert_eq!(intake.fill().await.unwrap(), Fill::EndOfStream);
    assert_eq!(intake.fill().await.unwrap(), Fill::EndOfStream);
    let cut_short = intake.read_payload(1, PATIENCE).await.unwrap_err();
    assert_eq!(cut_short.kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn what_was_read_ahead_is_taken_in_order_and_then_the_end() {
    for length in [0, 100, BUFFER_BYTES - 2, BUFFER_BYTES, 5_000_000] {
        read_ahead_and_take(length).await;
    }
}

#[tokio::test]
async fn silence_is_waited_for_but_not_taken_for_the_end() {
    let (mut intake, mut peer) = intake();
    peer.write_all(b"cd").await.unwrap();
    let before = Moment::now();
    let since = intake.read_ahead_to_silence().await;
    assert!(since >= before && since < Moment::now());
    assert!(!intake.has_ended());
    assert_eq!(intake.take(), Some(*b"abcd"));
    drop(peer);
    assert_eq!(intake.fill().await.unwrap(), Fill::EndOfStream);
}

#[tokio::test]
async fn a_peer_that_trickles_is_almost_silent() {
    let (mut intake, mut peer) = intake();
    let trickling = tokio::spawn(async move {
        let mut drops = tokio::time::interval(SILENCE / 4);
        loop {
            drops.tick().await;
            peer.write_all(b"cdefgh").await.unwrap();
        }
    });
    tokio::time::timeout(PATIENCE, intake.read_ahead_to_silence()).await.expect("it does not last for ever");
    assert!(!intake.has_ended());
    trickling.abort();
}

#[tokio::test]
async fn what_was_borrowed_comes_back_with_half_a_request_left() {
    for left in [5, SMALL_PAYLOAD_BYTES_MAX + 5] {
        let budget = Budget::new(1, 1);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (read, _write) = Stream::Unix(ours).split();
        let mut intake = Intake::new(read, b"", budget.loan());
        let sending = tokio::spawn(async move {
            theirs.write_all(&patterned(5_000_000)).await.unwrap();
            theirs
        });
        intake.read_ahead_to_silence().await;
        let theirs = sending.await.unwrap();
        let mut rest = patterned(5_000_000).split_off(5_000_000 - left);
        intake.read_payload(5_000_000 - left, PATIENCE).await.unwrap();
        let mut other = budget.loan();
        assert!(!other.try_borrow(128 << 20), "much is buffered");
        rest.push(b'x');
        let mut reading = pin!(intake.read_payload(left + 1, PATIENCE));
        assert!(poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx).is_pending())).await);
        assert!(other.try_borrow(128 << 20), "it is only half a request that is waited for");
        let mut theirs = theirs;
        theirs.write_all(b"x").await.unwrap();
        assert!(reading.await.unwrap() == rest);
    }
}

#[tokio::test]
async fn reading_ahead_has_its_bounds_and_gives_back_what_it_borrowed() {
    let budget = Budget::new(1, 1);
    let mut intakes = Vec::new();
    for _ in 0..4 {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (read, _write) = Stream::Unix(ours).split();
        let mut intake = Intake::new(read, b"", budget.loan());
        let sending = tokio::spawn(async move { theirs.write_all(&patterned(MUCH)).await });
        intake.read_ahead_to_silence().await;
        intakes.push((intake, sending));
    }
    let lengths: Vec<usize> = intakes.iter().map(|(intake, _)| intake.buffered_bytes()).collect();
    assert_eq!(lengths[..3], [READ_AHEAD_BYTES_MAX; 3]);
    assert!(lengths[3] < READ_AHEAD_BYTES_MAX, "three have taken almost all that there is");
    let mut expected = patterned(MUCH);
    let (mut first, sending) = intakes.swap_remove(0);
    let (mut last, _sending) = intakes.swap_remove(0);
    assert!(first.read_payload(MUCH, PATIENCE).await.unwrap() == expected);
    sending.await.unwrap().unwrap();
    assert_eq!(first.fill().await.unwrap(), Fill::EndOfStream);
    last.read_ahead_to_silence().await;
    assert_eq!(last.buffered_bytes(), READ_AHEAD_BYTES_MAX, "what one gave back another has taken");
    expected.truncate(READ_AHEAD_BYTES_MAX);
    assert!(last.read_payload(READ_AHEAD_BYTES_MAX, PATIENCE).await.unwrap() == expected);
}

#[tokio::test]
async fn a_long_wait_sees_the_end_and_a_short_one_reads_nothing() {
    let (mut intake, mut peer) = intake();
    peer.write_all(b"cd").await.unwrap();
    intake.read_ahead_during(async {}).await;
    assert!(!intake.holds(4));
    let (done, wait) = tokio::sync::oneshot::channel();
    let sending = tokio::spawn(async move {
        peer.write_all(&patterned(1_000_000)).await.unwrap();
        drop(peer);
        done.send(()).unwrap();
    });
    tokio::time::timeout(PATIENCE, intake.read_ahead_during(wait)).await.unwrap().unwrap();
    sending.await.unwrap();
    assert!(intake.holds(500_000), "the rest fits the socket");
}
