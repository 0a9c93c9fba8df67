//! What stands behind an error, and how it is told: in one line, with everything that caused it.
//!
//! Error types name their cause as source and leave it out of their own message; logs and answers over gRPC have one line.

use std::error::Error;
use std::io;

/// Causes that are looked at, at most. A chain is short; a cycle is not possible but cheap to exclude.
const MOST: usize = 32;

/// Returns an error and everything that caused it, also through `io::Error`, whose own `source` skips what it wraps.
pub fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| cause(*error)).take(MOST)
}

fn cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(inner) => Some(inner as &(dyn Error + 'static)),
        None => error.source(),
    }
}

/// Returns the messages of `error` and of everything that caused it, joined by `: `; a cause that the text before it
/// already ends with is not said twice.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Told(&'static str, #[source] std::io::Error);

    #[test]
    fn what_an_io_error_wraps_is_a_cause() {
        let inner = Told("inner", io::Error::other("disk is full"));
        let error = io::Error::other(io::Error::other(inner));
        assert!(causes(&error).any(|cause| cause.is::<Told>()));
        assert_eq!(causes(&error).last().map(ToString::to_string).as_deref(), Some("disk is full"));
    }

    #[test]
    fn every_cause_is_named_once() {
        let full = || std::io::Error::other("disk is full");
        assert_eq!(with_causes(&Told("write record 3", full())), "write record 3: disk is full");
        assert_eq!(
            with_causes(&Told("write record 3: disk is full", full())),
            "write record 3: disk is full"
        );
        assert_eq!(with_causes(&full()), "disk is full");
    }
}
