//! The status report for people: a heading and three lines of figures per volume, one aligned row per replica.
//!
//! Owns layout only; every figure comes from the report.

use std::fmt::Write;

use listener_agent::config::ByteSize;

use super::{ReplicaState, ReplicaStatus, ResyncStatus, StatusReport, VolumeStatus};

const HEADINGS: [&str; 8] = ["REPLICA", "STATE", "DURABLE", "LAG", "RESYNC", "CHECKSUMS", "ADDRESS", "REASON"];

/// The report as text of several lines, each with its line end.
pub fn render(report: &StatusReport) -> String {
    if report.volumes.is_empty() {
        return "no volumes\n".to_owned();
    }
    let volumes: Vec<String> = report.volumes.iter().map(render_volume).collect();
    volumes.join("\n")
}

fn render_volume(volume: &VolumeStatus) -> String {
    let offline = volume.replicas.iter().filter(|r| r.state == ReplicaState::Offline).count();
    let offline = if offline > 0 { format!(", {offline} offline") } else { String::new() };
    let mut text = format!(
        "{}  {}  {}  {} of {} replicas in the view{offline}\n",
        volume.name,
        volume.state.word().to_uppercase(),
        human(volume.size),
        volume.view.len(),
        volume.replicas.len(),
    );
    if let Some(blocked) = &volume.blocked {
        text.push_str(&format!("  does not start: {blocked}\n"));
    }
    let (read, write) = (volume.latency_us.read, volume.latency_us.write);
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "  epoch {}, seq {}, ack write={} flush={}, exposed {}, uuid {}",
        volume.epoch,
        volume.seq,
        word(volume.ack.write),
        word(volume.ack.flush),
        human(volume.exposed_bytes),
        volume.uuid,
    );
    let _ = writeln!(
        text,
        "  {} reads (p50 {}, p99 {}), {} writes (p50 {}, p99 {})",
        volume.reads,
        microseconds(read.p50),
        microseconds(read.p99),
        volume.writes,
        microseconds(write.p50),
        microseconds(write.p99),
    );
    let _ = writeln!(text, "  {}", volume.scrub.line());
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(volume.replicas.iter().map(row));
    text.push_str(&align(&rows));
    text
}

fn word(policy: crate::config::AckPolicy) -> &'static str {
    match policy {
        crate::config::AckPolicy::First => "first",
        crate::config::AckPolicy::Majority => "majority",
        crate::config::AckPolicy::All => "all",
    }
}

fn row(replica: &ReplicaStatus) -> [String; 8] {
    [
        replica.name.clone(),
        replica.state.word().to_owned(),
        replica.durable_seq.to_string(),
        lag(replica),
        replica.resync.as_ref().map_or("-".to_owned(), resync_progress),
        checksums(replica),
        replica.address.clone(),
        replica.reason.clone().unwrap_or_default(),
    ]
}

fn lag(replica: &ReplicaStatus) -> String {
    if replica.lag_records == 0 {
        return "-".to_owned();
    }
    format!("{} records, {}, {}", replica.lag_records, human(replica.lag_bytes), milliseconds(replica.lag_ms))
}

/// How far a resync is: percent, rate, time to go.
pub fn resync_progress(resync: &ResyncStatus) -> String {
    let percent = (u128::from(resync.done_bytes) * 100).checked_div(u128::from(resync.total_bytes)).unwrap_or(100);
    let mut text = format!("{percent} % of {}, {}/s", human(resync.total_bytes), human(resync.bytes_per_second));
    if let Some(seconds) = resync.eta_seconds {
        text.push_str(", ");
        text.push_str(&duration(seconds));
        text.push_str(" to go");
    }
    text
}

fn checksums(replica: &ReplicaStatus) -> String {
    match (replica.checksum_errors, replica.repaired_blocks) {
        (0, 0) => "ok".to_owned(),
        (errors, repaired) => format!("{errors} bad, {repaired} repaired"),
    }
}

/// Pads every column but the last to its widest cell; two spaces before each column.
fn align<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "  {cell:<width$}");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

pub(super) fn human(bytes: u64) -> String {
    ByteSize::from_bytes(bytes).human()
}

fn microseconds(value: u64) -> String {
    match value {
        0..1_000 => format!("{value} us"),
        1_000..1_000_000 => format!("{:.1} ms", value as f64 / 1e3),
        1_000_000.. => format!("{:.1} s", value as f64 / 1e6),
    }
}

fn milliseconds(value: u64) -> String {
    match value {
        0..1_000 => format!("{value} ms"),
        1_000.. => format!("{:.1} s", value as f64 / 1e3),
    }
}

pub(super) fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3_600.. => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
    }
}
