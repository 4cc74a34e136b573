//! The cheapest workers that are fast enough together: a covering knapsack, solved exactly by branch and bound.

/// Nodes of the search; dozens of kinds need a few thousand.
const MAX_NODES: u32 = 500_000;

/// Workers of one kind, as the search sees them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Offer {
    /// Price of one, not negative.
    pub price: f64,
    /// Throughput of one.
    pub rate: f64,
    /// How many there are.
    pub available: u32,
}

/// What is taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// How many of each offer, in their order.
    pub counts: Vec<u32>,
    /// Whether nothing is cheaper; false when the search gave up after too many nodes.
    pub exact: bool,
}

/// The cheapest counts whose rates add up to `needed`; none where all offers together do not.
pub fn cheapest(offers: &[Offer], needed: f64) -> Option<Choice> {
    let usable = |i: &usize| offers[*i].rate > 0.0 && offers[*i].available > 0;
    let mut order: Vec<usize> = (0..offers.len()).filter(usable).collect();
    let per_rate = |i: usize| offers[i].price / offers[i].rate;
    order.sort_by(|a, b| per_rate(*a).total_cmp(&per_rate(*b)).then(a.cmp(b)));
    let sorted: Vec<Offer> = order.iter().map(|i| offers[*i]).collect();
    let whole: f64 = sorted.iter().map(|o| o.rate * f64::from(o.available)).sum();
    if whole < needed {
        return None;
    }
    let mut search = Search { offers: &sorted, best: None, nodes: 0 };
    let mut counts = vec![0; sorted.len()];
    search.visit(0, needed, 0.0, &mut counts);
    let exact = search.nodes < MAX_NODES;
    // All of everything is enough, so something was found unless the very first descent was too long.
    let (_, found) = search.best?;
    let mut counts = vec![0; offers.len()];
    order.iter().zip(&found).for_each(|(i, n)| counts[*i] = *n);
    Some(Choice { counts, exact })
}

struct Search<'a> {
    /// Cheapest per throughput first.
    offers: &'a [Offer],
    best: Option<(f64, Vec<u32>)>,
    nodes: u32,
}

impl Search<'_> {
    /// Tries counts of the offers from `at` on, most first.
    fn visit(&mut self, at: usize, missing: f64, price: f64, counts: &mut Vec<u32>) {
        self.nodes += 1;
        if missing <= 0.0 {
            if self.best.as_ref().is_none_or(|(best, _)| price < *best) {
                self.best = Some((price, counts.clone()));
            }
            return;
        }
        let Some(least) = self.least(at, missing) else { return };
        if self.nodes >= MAX_NODES || self.best.as_ref().is_some_and(|(best, _)| price + least >= *best) {
            return;
        }
        let offer = self.offers[at];
        let most = ((missing / offer.rate).ceil() as u32).min(offer.available);
        for n in (0..=most).rev() {
            counts[at] = n;
            let n = f64::from(n);
            self.visit(at + 1, missing - n * offer.rate, price + n * offer.price, counts);
        }
        counts[at] = 0;
    }

    /// What the missing throughput costs at least: parts of workers could be had. None where it cannot be had.
    fn least(&self, at: usize, mut missing: f64) -> Option<f64> {
        let mut price = 0.0;
        for offer in &self.offers[at..] {
            let n = (missing / offer.rate).min(f64::from(offer.available));
            price += n * offer.price;
            missing -= n * offer.rate;
            if missing <= 1e-12 {
                return Some(price);
            }
        }
        None
    }
}

/// How many of `rate` make up for `missing`.
pub fn more(missing: f64, rate: f64) -> u32 {
    if missing <= 0.0 { 0 } else { (missing / rate).ceil() as u32 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every combination.
    fn brute_force(offers: &[Offer], needed: f64) -> Option<f64> {
        let Some((first, rest)) = offers.split_first() else { return (needed <= 0.0).then_some(0.0) };
        let with = |n: u32| {
            let n = f64::from(n);
            Some(n * first.price + brute_force(rest, needed - n * first.rate)?)
        };
        (0..=first.available).filter_map(with).min_by(f64::total_cmp)
    }

    fn sum(offers: &[Offer], choice: &Choice, of: fn(&Offer) -> f64) -> f64 {
        offers.iter().zip(&choice.counts).map(|(o, n)| of(o) * f64::from(*n)).sum()
    }

    proptest! {
        #[test]
        fn nothing_is_cheaper(
            offers in proptest::collection::vec((0_u32..200, 0_u32..60, 0_u32..5), 0..5), needed in 0_u32..300,
        ) {
            let offer = |(price, rate, available): &(u32, u32, u32)| Offer {
                price: f64::from(*price), rate: f64::from(*rate), available: *available,
            };
            let offers: Vec<Offer> = offers.iter().map(offer).collect();
            let needed = f64::from(needed);
            let got = cheapest(&offers, needed);
            let price = got.as_ref().map(|choice| sum(&offers, choice, |o| o.price));
            prop_assert_eq!(price, brute_force(&offers, needed));
            if let Some(choice) = got {
                prop_assert!(choice.exact && sum(&offers, &choice, |o| o.rate) >= needed);
                prop_assert!(choice.counts.iter().zip(&offers).all(|(n, o)| *n <= o.available));
            }
        }
    }

    #[test]
    fn a_few_hundred_workers_of_many_kinds_are_still_exact() {
        let offer = |i: u32| Offer {
            price: 0.2 + 0.013 * f64::from(i * 7 % 24),
            rate: 0.05 + 0.011 * f64::from(i * 5 % 24),
            available: 10,
        };
        let offers: Vec<Offer> = (0..24).map(offer).collect();
        let choice = cheapest(&offers, 9.0).unwrap();
        assert!(choice.exact && sum(&offers, &choice, |o| o.rate) >= 9.0, "{choice:?}");
    }
}
