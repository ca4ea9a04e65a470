//! The report is a contract: its JSON is compared with the documented text, name by name and in order.

use super::*;

/// The contract's own example: every field, every kind of value.
const CONTRACT: &str = r#"{"volumes":[{"name":"vol0","uuid":"6f1c1b0e-97a1-4d0c-8a52-0d8e8f6a4a11","size":10737418240,"epoch":3,"seq":18204,"view":["a","b"],"state":"serving","blocked":null,"ack":{"write":"first","flush":"majority"},"exposed_bytes":8192,"replicas":[{"name":"a","address":"127.0.0.1:10811","state":"member","durable_seq":18204,"lag_records":0,"lag_bytes":0,"lag_ms":0,"resync":null,"reason":null,"checksum_errors":0,"repaired_blocks":0},{"name":"b","address":"/var/lib/nbdcast/b","state":"member","durable_seq":18190,"lag_records":14,"lag_bytes":57344,"lag_ms":1250,"resync":null,"reason":null,"checksum_errors":2,"repaired_blocks":2},{"name":"c","address":"127.0.0.1:10813","state":"syncing","durable_seq":17000,"lag_records":0,"lag_bytes":0,"lag_ms":0,"resync":{"done_bytes":536870912,"total_bytes":2147483648,"bytes_per_second":104857600,"eta_seconds":75},"reason":"its disk was full","checksum_errors":0,"repaired_blocks":0}],"reads":120,"writes":9001,"read_bytes":491520,"written_bytes":36868096,"latency_us":{"read":{"p50":84,"p99":1900},"write":{"p50":310,"p99":2500000}},"block_statuses":17,"caches":5,"scrub":{"state":"running","waits_for":null,"done_bytes":2684354560,"total_bytes":10737418240,"bytes_per_second":52428800,"eta_seconds":153,"found":{"bad_blocks":2,"differing_blocks":0,"repaired_blocks":2,"unrepaired_blocks":0,"incomplete_bytes":0},"last":{"began_ms":1764000000000,"ended_ms":1764003600000,"is_finished":true,"done_bytes":10737418240,"counts":{"bad_blocks":0,"differing_blocks":0,"repaired_blocks":0,"unrepaired_blocks":0,"incomplete_bytes":0}},"next_ms":null}}]}"#;

/// The report of the contract's example.
pub(crate) fn sample() -> StatusReport {
    serde_json::from_str(CONTRACT).expect("the contract's example parses")
}

#[test]
fn the_json_has_the_names_and_order_of_the_contract() {
    let json = serde_json::to_string(&sample()).expect("a report is plain data");
    assert_eq!(json, CONTRACT);
}

#[test]
fn every_state_has_the_same_word_in_json_and_in_text() {
    for state in ReplicaState::ALL {
        let json = serde_json::to_string(&state).expect("a word");
        assert_eq!(json, format!("\"{}\"", state.word()));
    }
    for state in [VolumeState::Starting, VolumeState::Serving, VolumeState::Frozen, VolumeState::Failed] {
        let json = serde_json::to_string(&state).expect("a word");
        assert_eq!(json, format!("\"{}\"", state.word()));
    }
}

#[test]
fn people_see_one_aligned_row_per_replica() {
    let expected = "\
vol0  SERVING  10 GiB  2 of 3 replicas in the view
  epoch 3, seq 18204, ack write=first flush=majority, exposed 8 KiB, uuid 6f1c1b0e-97a1-4d0c-8a52-0d8e8f6a4a11
  120 reads (p50 84 us, p99 1.9 ms), 9001 writes (p50 310 us, p99 2.5 s)
  scrub 25 % of 10 GiB, 50 MiB/s, 2 min 33 s to go; so far 2 bad blocks, 0 differing, 2 repaired, 0 not repaired
  REPLICA  STATE    DURABLE  LAG                        RESYNC                                      CHECKSUMS          ADDRESS             REASON
  a        member   18204    -                          -                                           ok                 127.0.0.1:10811
  b        member   18190    14 records, 56 KiB, 1.2 s  -                                           2 bad, 2 repaired  /var/lib/nbdcast/b
  c        syncing  17000    -                          25 % of 2 GiB, 100 MiB/s, 1 min 15 s to go  ok                 127.0.0.1:10813     its disk was full
";
    let found = render(&sample());
    assert_eq!(found, expected, "found:\n{found}");
}

#[test]
fn a_serving_engine_has_no_complaints_even_with_a_replica_out_of_sync() {
    assert_eq!(sample().complaints(), Vec::<String>::new());
}

#[test]
fn a_frozen_volume_is_named_with_the_replicas_it_lacks() {
    let mut report = sample();
    report.volumes[0].state = VolumeState::Frozen;
    report.volumes[0].replicas[0].state = ReplicaState::Offline;
    assert_eq!(report.complaints(), ["volume vol0 is frozen (replicas: a offline, c syncing)"]);
    let nothing = StatusReport { volumes: vec![] };
    assert_eq!(nothing.complaints(), ["no volume is served yet"]);
}
