//! `nbdcast top`: the status of a running engine in the terminal, drawn anew every second, with rates and the last events.
//!
//! Owns the terminal while it runs and gives it back as it was. Asks only; changes nothing in the engine.

use std::fmt::Write as _;
use std::io::{IsTerminal, Read, Write, stdin, stdout};
use std::time::Duration;

use listener_agent::config::ByteSize;
use listener_agent::console::{Failure, ShutdownSignals};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::not_answered;
use crate::admin::client::{AdminUrl, AskError, ask_events, ask_status};
use crate::status::{EventStatus, StatusReport, VolumeStatus, render};

const DRAW_EVERY: Duration = Duration::from_secs(1);
/// Rows and columns of a terminal that does not know its size.
const SIZE_DEFAULT: (usize, usize) = (24, 80);

/// What was asked last, and when.
struct Seen {
    report: StatusReport,
    at: Instant,
}

pub(super) async fn run(url: &AdminUrl) -> Result<(), Failure> {
    let first = ask_status(url).await.map_err(not_answered)?;
    if !stdout().is_terminal() {
        return Err(Failure::usage("top needs a terminal").remedy("use `nbdcast status`, or --json for programs"));
    }
    let mut signals = ShutdownSignals::install()?;
    let mut keys = keys();
    let _screen = Screen::take();
    let mut before = Seen { report: first, at: Instant::now() };
    let mut ticks = tokio::time::interval(DRAW_EVERY);
    loop {
        tokio::select! {
            _ = signals.next() => return Ok(()),
            key = keys.recv() => if matches!(key, Some(b'q' | b'Q')) { return Ok(()) },
            _ = ticks.tick() => {
                let text = look(url, &mut before).await.unwrap_or_else(|error| format!("{error}\n"));
                draw(&text);
            }
        }
    }
}

/// The text of one screen.
async fn look(url: &AdminUrl, before: &mut Seen) -> Result<String, AskError> {
    let report = ask_status(url).await?;
    let events = ask_events(url).await?;
    let now = Seen { report, at: Instant::now() };
    let text = screen(&before.report, &now.report, now.at - before.at, &events);
    *before = now;
    Ok(text)
}

/// The status, what was done since `before`, and events, the latest first: as many as there is room for.
fn screen(before: &StatusReport, now: &StatusReport, passed: Duration, events: &[EventStatus]) -> String {
    let mut text = render(now);
    text.push('\n');
    for volume in &now.volumes {
        if let Some(before) = before.volumes.iter().find(|v| v.name == volume.name) {
            text.push_str(&rates(before, volume, passed));
        }
    }
    text.push('\n');
    for event in events.iter().rev() {
        let replica = event.replica.as_ref().map_or_else(String::new, |replica| format!(", replica {replica}"));
        let (time, severity) = (time_of_day(event.time_ms), event.severity.word());
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{time} {severity:7} volume {}{replica}: {}", event.volume, event.text);
    }
    text
}

fn rates(before: &VolumeStatus, now: &VolumeStatus, passed: Duration) -> String {
    // The counters of an engine that was started anew begin at 0.
    let per_second =
        |before: u64, now: u64| (now.saturating_sub(before) as f64 / passed.as_secs_f64().max(0.001)) as u64;
    let bytes = |before, now| ByteSize::from_bytes(per_second(before, now)).human();
    format!(
        "{}: {} reads/s, {}/s; {} writes/s, {}/s\n",
        now.name,
        per_second(before.reads, now.reads),
        bytes(before.read_bytes, now.read_bytes),
        per_second(before.writes, now.writes),
        bytes(before.written_bytes, now.written_bytes),
    )
}

/// In UTC.
fn time_of_day(time_ms: u64) -> String {
    let seconds = time_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

fn draw(text: &str) {
    let (rows, columns) = tcgetwinsize(stdout())
        .ok()
        .filter(|size| size.ws_row > 0 && size.ws_col > 0)
        .map_or(SIZE_DEFAULT, |size| (usize::from(size.ws_row), usize::from(size.ws_col)));
    let mut picture = String::from("\x1b[H");
    for line in text.lines().take(rows - 1) {
        picture.extend(line.chars().filter(|c| !c.is_control()).take(columns));
        picture.push_str("\x1b[K\r\n");
    }
    picture.push_str("\x1b[J");
    let mut stdout = stdout();
    // A terminal that is gone ends the program by its signal.
    let _ = stdout.write_all(picture.as_bytes()).and_then(|()| stdout.flush());
}

/// The keys that are pressed. The thread that reads them ends with the program.
fn keys() -> mpsc::Receiver<u8> {
    let (pressed, keys) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut key = [0];
        while stdin().read(&mut key).is_ok_and(|read| read == 1) {
            if pressed.blocking_send(key[0]).is_err() {
                return;
            }
        }
        // Without a keyboard only a signal ends it.
        std::thread::park();
    });
    keys
}

/// The terminal's other screen, and keys without Enter.
struct Screen {
    modes: Option<Termios>,
}

impl Screen {
    fn take() -> Screen {
        let modes = tcgetattr(stdin()).ok();
        if let Some(modes) = &modes {
            let mut raw = modes.clone();
            raw.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
            // Without it q takes an Enter.
            let _ = tcsetattr(stdin(), OptionalActions::Now, &raw);
        }
        let _ = stdout().write_all(b"\x1b[?1049h\x1b[?25l");
        Screen { modes }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut stdout = stdout();
        let _ = stdout.write_all(b"\x1b[?25h\x1b[?1049l").and_then(|()| stdout.flush());
        if let Some(modes) = &self.modes {
            let _ = tcsetattr(stdin(), OptionalActions::Now, modes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::EventSeverity;
    use crate::status::tests::sample;

    #[test]
    fn rates_are_what_was_added_in_the_time_passed() {
        let (before, mut now) = (sample(), sample());
        now.volumes[0].reads += 300;
        now.volumes[0].written_bytes += 8 << 20;
        let text = screen(&before, &now, Duration::from_secs(2), &[]);
        assert!(text.contains("\nvol0: 150 reads/s, 0 B/s; 0 writes/s, 4 MiB/s\n"), "{text}");
        let restarted = screen(&now, &before, Duration::from_secs(2), &[]);
        assert!(restarted.contains("vol0: 0 reads/s"), "{restarted}");
    }

    #[test]
    fn the_latest_event_comes_first() {
        let event = |time_ms, replica: Option<&str>, text: &str| EventStatus {
            time_ms,
            volume: "vol0".to_owned(),
            replica: replica.map(str::to_owned),
            severity: EventSeverity::Warning,
            text: text.to_owned(),
        };
        let events = [event(0, None, "one"), event(86_399_000 + 86_400_000, Some("b"), "two")];
        let text = screen(&sample(), &sample(), Duration::from_secs(1), &events);
        let end = "23:59:59Z warning volume vol0, replica b: two\n00:00:00Z warning volume vol0: one\n";
        assert!(text.ends_with(end), "{text}");
    }
}
