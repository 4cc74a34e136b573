//! Exact values of answers: sums of fractions times square roots times powers of pi, which is closed under `+ - *` and
//! under division by a single term.

use std::collections::BTreeMap;

use super::super::exact::{ExactError, Fraction};

/// `sum of c sqrt(n) pi^p`, with square-free `n` and no zero `c`; equal exactly when equal as a map.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Value(BTreeMap<(u64, i8), Fraction>);

/// Largest number under a root: taking squares out costs up to the root of this many divisions for every product, and
/// an answer that somebody sent may hold many products.
const MAX_RADICAND: i128 = 1_000_000;
const MAX_TERMS: usize = 32;

impl Value {
    pub(super) fn fraction(value: Fraction) -> Self {
        Self::term(1, 0, value)
    }

    pub(super) fn pi() -> Self {
        Self::term(1, 1, Fraction::ONE)
    }

    fn term(radicand: u64, pi: i8, by: Fraction) -> Self {
        let mut terms = BTreeMap::new();
        if by != Fraction::ZERO {
            terms.insert((radicand, pi), by);
        }
        Self(terms)
    }

    /// The fraction that this is, if it is one.
    pub(super) fn as_fraction(&self) -> Option<Fraction> {
        match (self.0.len(), self.0.first_key_value()) {
            (0, _) => Some(Fraction::ZERO),
            (1, Some(((1, 0), by))) => Some(*by),
            _ => None,
        }
    }

    pub(super) fn plus(&self, other: &Self) -> Result<Self, ExactError> {
        let mut sum = self.clone();
        for (key, by) in &other.0 {
            let total = sum.0.get(key).copied().unwrap_or(Fraction::ZERO).plus(*by)?;
            if total == Fraction::ZERO {
                sum.0.remove(key);
            } else {
                sum.0.insert(*key, total);
            }
        }
        if sum.0.len() > MAX_TERMS { Err(ExactError::Overflow) } else { Ok(sum) }
    }

    pub(super) fn negated(&self) -> Self {
        Self(self.0.iter().map(|(key, by)| (*key, by.negated())).collect())
    }

    pub(super) fn times(&self, other: &Self) -> Result<Self, ExactError> {
        let mut product = Self::default();
        for ((n, p), a) in &self.0 {
            for ((m, q), b) in &other.0 {
                let (outside, inside) = square_free(i128::from(*n) * i128::from(*m))?;
                let by = a.times(*b)?.times(Fraction::new(outside, 1)?)?;
                let pi = p.checked_add(*q).ok_or(ExactError::Overflow)?;
                product = product.plus(&Self::term(inside, pi, by))?;
            }
        }
        Ok(product)
    }

    /// Division by one term; sums of roots in a denominator are not brought to lowest form.
    pub(super) fn over(&self, other: &Self) -> Result<Self, ExactError> {
        let mut terms = other.0.iter();
        match (terms.next(), terms.next()) {
            (None, _) => Err(ExactError::DivisionByZero),
            (Some(((n, p), by)), None) => {
                // 1 / (c sqrt(n) pi^p) = sqrt(n) / (c n) pi^-p
                let by = Fraction::ONE.over(by.times(Fraction::new(i128::from(*n), 1)?)?)?;
                self.times(&Self::term(*n, p.checked_neg().ok_or(ExactError::Overflow)?, by))
            }
            _ => Err(ExactError::Overflow),
        }
    }

    /// The square root of a fraction that is not negative.
    pub(super) fn root(&self) -> Result<Self, ExactError> {
        let value = self.as_fraction().filter(|v| v.numerator() >= 0).ok_or(ExactError::Overflow)?;
        // sqrt(a / b) = sqrt(a b) / b
        let under = value.numerator().checked_mul(value.denominator()).ok_or(ExactError::Overflow)?;
        let (outside, inside) = square_free(under)?;
        Ok(Self::term(inside, 0, Fraction::new(outside, value.denominator())?))
    }

    pub(super) fn power(&self, exponent: i128) -> Result<Self, ExactError> {
        if exponent.abs() > 64 {
            return Err(ExactError::Overflow);
        }
        let mut product = Self::fraction(Fraction::ONE);
        for _ in 0..exponent.abs() {
            product = product.times(self)?;
        }
        if exponent < 0 { Self::fraction(Fraction::ONE).over(&product) } else { Ok(product) }
    }
}

/// `sqrt(n) = outside sqrt(inside)`.
fn square_free(n: i128) -> Result<(i128, u64), ExactError> {
    if !(0..=MAX_RADICAND).contains(&n) {
        return Err(ExactError::Overflow);
    }
    let (mut outside, mut inside, mut divisor) = (1, n.max(1), 2);
    while divisor * divisor <= inside {
        while inside % (divisor * divisor) == 0 {
            inside /= divisor * divisor;
            outside *= divisor;
        }
        divisor += 1;
    }
    let inside = u64::try_from(inside).map_err(|_| ExactError::Overflow)?;
    Ok(if n == 0 { (0, 1) } else { (outside, inside) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(n: i64) -> Value {
        Value::fraction(Fraction::whole(n))
    }

    #[test]
    fn roots_simplify_and_cancel() {
        let root = |n| whole(n).root().unwrap();
        assert_eq!(root(12), root(3).times(&whole(2)).unwrap());
        assert_eq!(root(2).times(&root(8)).unwrap(), whole(4));
        assert_eq!(whole(1).over(&root(2)).unwrap(), root(2).over(&whole(2)).unwrap());
        assert_eq!(root(0), whole(0));
        assert_eq!(root(2).plus(&root(2).negated()).unwrap(), whole(0));
        assert!(root(2).plus(&root(3)).unwrap().as_fraction().is_none());
        assert_eq!(whole(2).power(-2).unwrap().as_fraction(), Fraction::new(1, 4).ok());
        assert!(whole(-4).root().is_err());
        assert_eq!(
            whole(1_000_003).root(),
            Err(ExactError::Overflow),
            "its root would take a million divisions"
        );
        assert_eq!(whole(1).over(&whole(0)), Err(ExactError::DivisionByZero));
    }
}
