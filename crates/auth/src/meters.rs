//! The counters that this crate bumps. The daemon fills them; the default counts nothing.

use std::fmt;
use std::time::Duration;

use crate::{AuthError, CredentialScope};

/// Counters. Labels are bounded: an option is one of the keychains' names.
pub trait Meters: Send + Sync + fmt::Debug {
    /// An option was asked and answered with candidates (`true`) or without.
    fn resolved(&self, _option: &'static str, _found: bool) {}
    /// An option could not tell.
    fn option_failed(&self, _option: &'static str) {}
    /// The registry refused a candidate of an option.
    fn rejected(&self, _option: &'static str) {}
    /// A request gets no further for this reason, with the credential of `option` where one was presented.
    fn denied(&self, _scope: &CredentialScope, _option: Option<&'static str>, _error: &AuthError) {}
    /// A token was asked for, with or without success.
    fn token_fetched(&self, _success: bool) {}
    /// A helper ran for so long, with or without success.
    fn helper_ran(&self, _took: Duration, _success: bool) {}
}

/// Counts nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoMeters;

impl Meters for NoMeters {}
