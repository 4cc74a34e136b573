//! Exact arithmetic: fractions, and a parser for `+ - * / ( )` over them. What the Countdown verifier and the calculator
//! tool compute with, so that 0.1 + 0.2 is 0.3.

use std::fmt;

/// A fraction in lowest terms with a positive denominator. Every operation is checked; what does not fit 127 bits is
/// [`ExactError::Overflow`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fraction {
    numerator: i128,
    denominator: i128,
}

/// Why an expression has no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExactError {
    /// Not an expression.
    #[error("unexpected {found} at character {at}")]
    Syntax {
        /// What stands there.
        found: String,
        /// Where, counted from 0.
        at: usize,
    },
    /// Longer or deeper nested than allowed.
    #[error("the expression is longer than {limit} characters or nested too deeply")]
    TooLarge {
        /// Most characters.
        limit: usize,
    },
    /// Division by zero.
    #[error("division by zero")]
    DivisionByZero,
    /// A number that does not fit.
    #[error("a number does not fit 127 bits")]
    Overflow,
}

fn gcd(mut a: i128, mut b: i128) -> i128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a.abs()
}

impl Fraction {
    /// 0.
    pub const ZERO: Self = Self { numerator: 0, denominator: 1 };
    /// 1.
    pub const ONE: Self = Self { numerator: 1, denominator: 1 };

    /// `numerator / denominator`.
    ///
    /// # Errors
    /// When the denominator is 0 or a part is the smallest i128.
    pub fn new(numerator: i128, denominator: i128) -> Result<Self, ExactError> {
        if denominator == 0 {
            return Err(ExactError::DivisionByZero);
        }
        if numerator == i128::MIN || denominator == i128::MIN {
            return Err(ExactError::Overflow);
        }
        let shared = gcd(numerator, denominator).max(1) * denominator.signum();
        Ok(Self { numerator: numerator / shared, denominator: denominator / shared })
    }

    /// A whole number.
    pub fn whole(value: i64) -> Self {
        Self { numerator: value.into(), denominator: 1 }
    }

    /// The numerator, with the sign.
    pub fn numerator(self) -> i128 {
        self.numerator
    }

    /// The denominator, positive.
    pub fn denominator(self) -> i128 {
        self.denominator
    }

    /// `self + other`.
    ///
    /// # Errors
    /// When the result does not fit, as with all operations here.
    pub fn plus(self, other: Self) -> Result<Self, ExactError> {
        let cross = |a: i128, b: i128| a.checked_mul(b).ok_or(ExactError::Overflow);
        let left = cross(self.numerator, other.denominator)?;
        let right = cross(other.numerator, self.denominator)?;
        let sum = left.checked_add(right).ok_or(ExactError::Overflow)?;
        Self::new(sum, cross(self.denominator, other.denominator)?)
    }

    /// `-self`.
    #[must_use]
    pub fn negated(self) -> Self {
        Self { numerator: -self.numerator, ..self }
    }

    /// `self * other`.
    ///
    /// # Errors
    /// When the result does not fit.
    pub fn times(self, other: Self) -> Result<Self, ExactError> {
        // Dividing crosswise first keeps the products as small as the result allows.
        let (a, b) =
            (gcd(self.numerator, other.denominator).max(1), gcd(other.numerator, self.denominator).max(1));
        let product = |x: i128, y: i128| x.checked_mul(y).ok_or(ExactError::Overflow);
        Self::new(
            product(self.numerator / a, other.numerator / b)?,
            product(self.denominator / b, other.denominator / a)?,
        )
    }

    /// `self / other`.
    ///
    /// # Errors
    /// When `other` is 0 or the result does not fit.
    pub fn over(self, other: Self) -> Result<Self, ExactError> {
        self.times(Self::new(other.denominator, other.numerator)?)
    }

    /// A decimal such as `12`, `.5` or `3.25`, without sign.
    ///
    /// # Errors
    /// When it is none or has too many digits.
    pub fn decimal(text: &str) -> Result<Self, ExactError> {
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let digits = format!("{whole}{part}");
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(ExactError::Syntax { found: format!("{text:?}"), at: 0 });
        }
        let numerator = digits.parse().map_err(|_| ExactError::Overflow)?;
        let places = u32::try_from(part.len()).map_err(|_| ExactError::Overflow)?;
        Self::new(numerator, 10_i128.checked_pow(places).ok_or(ExactError::Overflow)?)
    }
}

impl fmt::Display for Fraction {
    /// `7`, or `7/2`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.denominator {
            1 => write!(f, "{}", self.numerator),
            d => write!(f, "{}/{d}", self.numerator),
        }
    }
}

/// Most characters of an expression.
pub const MAX_EXPRESSION: usize = 512;
const MAX_DEPTH: usize = 32;

/// An expression's value and the numbers that it names, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evaluated {
    /// The value.
    pub value: Fraction,
    /// Every literal.
    pub numbers: Vec<Fraction>,
}

/// Evaluates `+ - * /`, parentheses, signs and decimals; `×`, `·`, `÷` and `−` are taken for their plain forms.
///
/// # Errors
/// When it is no expression, too large, divides by zero or overflows.
pub fn evaluate(text: &str) -> Result<Evaluated, ExactError> {
    if text.len() > MAX_EXPRESSION {
        return Err(ExactError::TooLarge { limit: MAX_EXPRESSION });
    }
    let plain = |c: char| match c {
        '×' | '·' => '*',
        '÷' => '/',
        '−' | '–' => '-',
        c => c,
    };
    let mut parser = Parser {
        characters: text.chars().map(plain).filter(|c| !c.is_whitespace()).collect(),
        at: 0,
        depth: 0,
        numbers: Vec::new(),
    };
    let value = parser.sum()?;
    match parser.peek() {
        None => Ok(Evaluated { value, numbers: parser.numbers }),
        Some(_) => Err(parser.unexpected()),
    }
}

struct Parser {
    characters: Vec<char>,
    at: usize,
    depth: usize,
    numbers: Vec<Fraction>,
}

impl Parser {
    fn peek(&self) -> Option<char> {
        self.characters.get(self.at).copied()
    }

    fn take(&mut self, wanted: &[char]) -> Option<char> {
        let next = self.peek().filter(|c| wanted.contains(c))?;
        self.at += 1;
        Some(next)
    }

    fn unexpected(&self) -> ExactError {
        let found = self.peek().map_or_else(|| "end".to_owned(), |c| format!("{c:?}"));
        ExactError::Syntax { found, at: self.at }
    }

    fn sum(&mut self) -> Result<Fraction, ExactError> {
        let mut value = self.product()?;
        while let Some(sign) = self.take(&['+', '-']) {
            let next = self.product()?;
            value = value.plus(if sign == '+' { next } else { next.negated() })?;
        }
        Ok(value)
    }

    fn product(&mut self) -> Result<Fraction, ExactError> {
        let mut value = self.factor()?;
        while let Some(sign) = self.take(&['*', '/']) {
            let next = self.factor()?;
            value = if sign == '*' { value.times(next)? } else { value.over(next)? };
        }
        Ok(value)
    }

    fn factor(&mut self) -> Result<Fraction, ExactError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(ExactError::TooLarge { limit: MAX_EXPRESSION });
        }
        let value = if let Some(sign) = self.take(&['+', '-']) {
            let value = self.factor()?;
            if sign == '-' { value.negated() } else { value }
        } else if self.take(&['(']).is_some() {
            let value = self.sum()?;
            self.take(&[')']).ok_or_else(|| self.unexpected())?;
            value
        } else {
            let start = self.at;
            while self.peek().is_some_and(|c| c.is_ascii_digit() || c == '.') {
                self.at += 1;
            }
            let text: String = self.characters[start..self.at].iter().collect();
            if text.is_empty() {
                return Err(self.unexpected());
            }
            let value = Fraction::decimal(&text)?;
            self.numbers.push(value);
            value
        };
        self.depth -= 1;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value(text: &str) -> String {
        evaluate(text).map_or_else(|e| e.to_string(), |e| e.value.to_string())
    }

    #[test]
    fn expressions_are_exact_and_bind_as_in_school() {
        for (text, want) in [
            ("1+2*3", "7"),
            ("(1+2)*3", "9"),
            ("8/4/2", "1"),
            ("0.1+0.2", "3/10"),
            ("-3-(-4)", "1"),
            ("7 ÷ 2 × 2", "7"),
            ("10-2-3", "5"),
        ] {
            assert_eq!(value(text), want, "{text}");
        }
        assert_eq!(evaluate("1/(3-3)"), Err(ExactError::DivisionByZero));
        assert!(matches!(evaluate("1+"), Err(ExactError::Syntax { at: 2, .. })));
        assert!(matches!(evaluate("2 3"), Ok(e) if e.value == Fraction::whole(23)));
        assert!(matches!(evaluate("1.2.3"), Err(ExactError::Syntax { .. })));
        assert!(matches!(evaluate(&"(".repeat(100)), Err(ExactError::TooLarge { .. })));
        assert!(matches!(evaluate(&"9".repeat(60)), Err(ExactError::Overflow)));
    }

    proptest! {
        #[test]
        fn nothing_makes_the_parser_panic(text in "[-+*/(). 0-9a-z]{0,60}") {
            _ = evaluate(&text);
        }

        #[test]
        fn fractions_behave_as_fractions(a in -999_i128..999, b in 1_i128..99, c in -999_i128..999, d in 1_i128..99) {
            let (x, y) = (Fraction::new(a, b).unwrap(), Fraction::new(c, d).unwrap());
            prop_assert_eq!(x.plus(y).unwrap(), Fraction::new(a * d + c * b, b * d).unwrap());
            prop_assert_eq!(x.times(y).unwrap(), Fraction::new(a * c, b * d).unwrap());
            if c != 0 {
                prop_assert_eq!(x.over(y).unwrap().times(y).unwrap(), x);
            }
        }
    }
}
