//! The outcome of one law.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::Serialize;

/// Why a law does not hold, or could not be looked at.
pub type Failure = Box<dyn std::error::Error>;

/// What a law comes to.
pub type Outcome = Result<Finding, Failure>;

/// A law that was looked at, or a reason for not doing so.
#[derive(Clone, Debug, PartialEq)]
pub enum Finding {
    /// It holds; there is nothing to measure.
    Holds,
    /// It holds if the deviation is at most the bound.
    Measured {
        /// The largest deviation from what the law says.
        deviation: f64,
        /// How large it may be.
        bound: f64,
    },
    /// It does not apply, for this reason.
    Skipped(String),
}

/// Whether a law holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It holds.
    Ok,
    /// It does not.
    Fail,
    /// It does not apply; the note says why.
    Skip,
}

/// One line of a report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// The law.
    #[serde(rename = "check")]
    pub name: String,
    /// Whether it holds.
    pub status: Status,
    /// The largest deviation, for a law that measures one.
    pub deviation: Option<f64>,
    /// How large it may be.
    pub bound: Option<f64>,
    /// Why it failed or does not apply.
    pub note: String,
}

impl Check {
    /// Looks at one law. A panic inside, which is how backends report most errors, is a failure with the panic's message.
    pub fn run(name: impl Into<String>, law: impl FnOnce() -> Outcome) -> Self {
        let outcome = catch_unwind(AssertUnwindSafe(law)).unwrap_or_else(|panic| Err(message(panic.as_ref()).into()));
        let name = name.into();
        let (status, deviation, bound, note) = match outcome {
            Ok(Finding::Holds) => (Status::Ok, None, None, String::new()),
            // A deviation that is not a number is no `Ok`.
            Ok(Finding::Measured { deviation, bound }) => {
                let status = if deviation <= bound { Status::Ok } else { Status::Fail };
                (status, Some(deviation), Some(bound), String::new())
            }
            Ok(Finding::Skipped(reason)) => (Status::Skip, None, None, reason),
            Err(failure) => (Status::Fail, None, None, failure.to_string()),
        };
        Self { name, status, deviation, bound, note }
    }

    /// A law that was not looked at.
    pub fn skip(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { name: name.into(), status: Status::Skip, deviation: None, bound: None, note: reason.into() }
    }

    /// Whether the law was broken.
    pub fn failed(&self) -> bool {
        self.status == Status::Fail
    }
}

/// One aligned line per check.
pub fn table(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1e}"));
    let line = |check: &Check| {
        let status = match check.status {
            Status::Ok => "ok",
            Status::Fail => "FAIL",
            Status::Skip => "skip",
        };
        let (deviation, bound) = (number(check.deviation), number(check.bound));
        format!("{:width$}  {status:4}  {deviation:>8}  {bound:>8}  {}", check.name, check.note).trim_end().to_owned()
            + "\n"
    };
    checks.iter().map(line).collect()
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("without a message"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(deviation: f64) -> Check {
        Check::run("merge", || Ok(Finding::Measured { deviation, bound: 1e-5 }))
    }

    #[test]
    fn a_deviation_up_to_the_bound_is_ok_and_not_a_number_is_not() {
        assert_eq!(measured(1e-5).status, Status::Ok);
        assert_eq!(measured(1.1e-5).status, Status::Fail);
        assert_eq!(measured(f64::NAN).status, Status::Fail);
    }

    #[test]
    fn a_panic_is_a_failure_with_its_message() {
        let check = Check::run("seams", || panic!("no kernel for {}", "f16"));
        assert!(check.failed() && check.note == "panic: no kernel for f16", "{check:?}");
    }

    #[test]
    fn a_line_of_json_is_what_the_table_over_all_backends_reads() {
        let json = serde_json::to_string(&measured(f64::NAN)).unwrap();
        assert_eq!(json, r#"{"check":"merge","status":"fail","deviation":null,"bound":0.00001,"note":""}"#);
    }

    #[test]
    fn the_table_is_aligned_and_ends_no_line_in_blanks() {
        let text = table(&[measured(1e-7), Check::skip("packed base", "none here")]);
        assert_eq!(text, "merge        ok      1.0e-7    1.0e-5\npacked base  skip         -         -  none here\n");
    }
}
