//! The learning rate as a function of the step alone, so that resuming needs no state.

use serde::{Deserialize, Serialize};

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// The peak, unchanged.
    Constant,
    /// A line to zero at the last step.
    #[default]
    Linear,
    /// Half a cosine to zero at the last step. Loshchilov and Hutter 2017, arXiv:1608.03983.
    Cosine,
}

impl Schedule {
    /// Fraction of the peak at `step` (from 0) of `steps`, the first `warmup` of which rise linearly from `1 / warmup`.
    pub fn factor(self, step: usize, steps: usize, warmup: usize) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let done = (step - warmup) as f64 / (steps.saturating_sub(warmup)).max(1) as f64;
        match self {
            Self::Constant => 1.0,
            Self::Linear => (1.0 - done).max(0.0),
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    #[test]
    fn rises_then_falls() {
        let at = |schedule: Schedule, step| schedule.factor(step, 110, 10);
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            assert_eq!(at(schedule, 0), 0.1);
            assert_eq!(at(schedule, 9), 1.0);
            assert_eq!(at(schedule, 10), 1.0);
        }
        assert_eq!(at(Schedule::Constant, 109), 1.0);
        assert!((at(Schedule::Linear, 60) - 0.5).abs() < 1e-12);
        assert!((at(Schedule::Cosine, 60) - 0.5).abs() < 1e-12);
        assert!((at(Schedule::Cosine, 35) - 0.853_553).abs() < 1e-6);
        assert_eq!(at(Schedule::Linear, 110), 0.0);
        assert_eq!(Schedule::Linear.factor(0, 1, 0), 1.0);
    }
}
