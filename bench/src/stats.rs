//! Medians and quartiles.

use serde::Serialize;

/// Median, quartiles and the greatest of some samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) lower_quartile: f64,
    pub(crate) median: f64,
    pub(crate) upper_quartile: f64,
    pub(crate) best: f64,
    pub(crate) samples: usize,
}

impl Spread {
    /// Of these samples; `None` if there are none.
    pub(crate) fn of(samples: &[f64]) -> Option<Self> {
        let sorted = sorted(samples);
        Some(Self {
            lower_quartile: quantile(&sorted, 0.25)?,
            median: quantile(&sorted, 0.5)?,
            upper_quartile: quantile(&sorted, 0.75)?,
            best: *sorted.last()?,
            samples: sorted.len(),
        })
    }
}

/// The median of the samples; 0 if there are none.
pub(crate) fn median(samples: &[f64]) -> f64 {
    quantile(&sorted(samples), 0.5).unwrap_or(0.0)
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The value below which this share of the sorted samples lies, interpolated between the nearest
/// two.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let position = share * sorted.len().checked_sub(1)? as f64;
    let sample = |index: f64| {
        let index = usize::try_from(whole(index)).ok()?;
        sorted.get(index).copied()
    };
    let (below, above) = (sample(position.floor())?, sample(position.ceil())?);
    Some(below + (above - below) * position.fract())
}

/// The whole part of a number that is not negative; what doesn't fit is the nearest that does.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the conversion saturates"
)]
pub(crate) fn whole(number: f64) -> u64 {
    number as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_interpolated_and_order_does_not_matter() {
        let spread = Spread::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(spread.median, 2.5);
        assert_eq!(spread.lower_quartile, 1.75);
        assert_eq!(spread.upper_quartile, 3.25);
        assert_eq!(spread.best, 4.0);
        assert_eq!(Spread::of(&[7.0]).unwrap().upper_quartile, 7.0);
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn quartiles_of_five_are_samples_themselves() {
        let spread = Spread::of(&[50.0, 10.0, 30.0, 20.0, 40.0]).unwrap();
        let quartiles = [spread.lower_quartile, spread.median, spread.upper_quartile];
        assert_eq!(quartiles, [20.0, 30.0, 40.0]);
        assert_eq!((spread.best, spread.samples), (50.0, 5));
    }

    #[test]
    fn median_of_odd_even_and_none() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn whole_parts_saturate() {
        assert_eq!([2.9, -1.0, 1e30].map(whole), [2, 0, u64::MAX]);
    }
}
