//! The result as a Markdown table.

use std::fmt::Write as _;

use crate::limits::Limit;
use crate::samples::Samples;
use crate::sides::Side;

/// A row: its name, whether more is better, and what is asked for.
type Row = (&'static str, bool, &'static str);

const ROWS: &[Row] = &[
    ("index build of big, s", false, "5 × faster"),
    ("index build of big, peak RSS, MB", false, "≤ 64"),
    ("lazy pull of big, s", false, "2 × faster"),
    ("first echo after it, s", false, "1.4 × faster"),
    ("second echo, s", false, ""),
    ("lazy pull of files100k, s", false, "6 × faster"),
    ("first echo after files100k, s", false, "1.4 × faster"),
    ("lazy pull of py, s", false, ""),
    ("pull to ready of py, s", false, "2 × faster"),
    ("pull of files10k, s", false, "as overlayfs"),
    ("cold sequential read of 629 MB, MB/s", true, "3 × faster"),
    ("daemon CPU of it, s", false, "≤ 0.55 of the peer's"),
    ("cold 4 KiB random read, p50, ms", false, "2 × faster"),
    ("re-read, spans cached, MB/s", true, "1.2 ×, or 90 % of the disk"),
    ("find -printf %s over 100 k files, s", false, "2 × faster"),
    ("pull to ready of py, 20 ms and 100 MB/s, s", false, "2 × faster"),
    ("background completion of big, MB/s of content", true, "≥ 336: 40 × the Go daemon's fixed 8.4"),
    ("cold sequential read, nothing beside, MB/s", true, ""),
    ("cold sequential read, completion of py beside, MB/s", true, "≥ 0.9 of nothing beside"),
    ("lazy pull of 127 layers, each answer 50 ms late, s", false, "≤ 1"),
    ("restart with 127 lazy layers, registry down, to ready, s", false, "≤ 0.3"),
    ("restart with 127 lazy layers, registry down, to all mounted, s", false, "≤ 1"),
    ("anonymous memory of a daemon that did nothing yet, MB", false, ""),
    ("after 127 layers came and went, MB", false, ""),
    ("anonymous memory per idle layer of 508, kB", false, "≤ 150"),
    ("after unmounting them, MB", false, ""),
    ("what they took and did not give back, %", false, "≤ 5"),
    ("growth of that by mounting and unmounting 508 more, %", false, "± 5"),
    ("processor in an idle minute with 508 layers, % of a core", false, "< 0.1"),
    ("requests in that minute", false, "0"),
    ("the same with containerd's statistics of 508 snapshots", false, ""),
    ("lookup among 10,000 secrets, p99, µs", false, "≤ 50"),
    ("lookup among 10,000 copies of one secret, p99, µs", false, "≤ 50"),
    ("first sync of 10,000 secrets, ms", false, "≤ 1000"),
    ("memory they hold, MB", false, "≤ 30"),
    ("relay: added to ImageStatus, p50, µs", false, ""),
    ("relay: added to ImageStatus, p99, µs", false, "≤ 150"),
    ("relay: added to 15 MiB ListImages, ms", false, "≤ 15"),
    ("daemon RSS idle, MB", false, "≤ 12"),
    ("daemon RSS after reading big, MB", false, "≤ 48"),
];

/// Who else is measured, in the same column: the name, and what it is.
const OTHERS: &[(&str, &str)] = &[
    ("overlayfs", "containerd's overlayfs"),
    ("pipe", "bytes passed on unread, in place of the relay"),
    ("answering", "a snapshotter that waits for four answers and then only says yes"),
];

/// Returns the tables: results, and the machine's limits.
pub(crate) fn markdown(samples: &Samples, sides: &[Side], limits: &[Limit], rounds: u32) -> String {
    let with_peer = sides.iter().any(|side| side.name == "peer");
    let mut text = format!("Medians of {rounds} rounds, least to most in brackets.\n\n");
    text.push_str("| work | ours |");
    text.push_str(if with_peer { " peer | ratio |" } else { "" });
    text.push_str(" asked |\n| --- | --- |");
    text.push_str(if with_peer { " --- | --- |" } else { "" });
    text.push_str(" --- |\n");
    for (name, more_is_better, asked) in ROWS {
        let Some(ours) = samples.summary(name, "ours") else { continue };
        let _ = write!(text, "| {name} | {} |", cell(ours));
        if with_peer {
            match samples.summary(name, "peer") {
                Some(peer) => {
                    let ratio = if *more_is_better { ours[0] / peer[0] } else { peer[0] / ours[0] };
                    let _ = write!(text, " {} | {ratio:.2} × |", cell(peer));
                }
                None => text.push_str(" - | - |"),
            }
        }
        let _ = writeln!(text, " {asked} |");
        for (who, what) in OTHERS {
            if let Some(theirs) = samples.summary(name, who) {
                let between = if with_peer { " | |" } else { "" };
                let _ = writeln!(text, "| – {what} | {} |{between} |", cell(theirs));
            }
        }
    }
    text.push_str("\n| machine | |\n| --- | --- |\n");
    for (name, value) in limits {
        let _ = writeln!(text, "| {name} | {value} |");
    }
    text
}

fn cell([median, least, most]: [f64; 3]) -> String {
    let digits = if median >= 100.0 {
        0
    } else if median >= 10.0 {
        1
    } else {
        2
    };
    format!("{median:.digits$} [{least:.digits$}–{most:.digits$}]")
}
