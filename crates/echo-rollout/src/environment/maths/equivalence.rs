//! Which answer a text gives, and whether two answers are equal.
//!
//! Rules: numbers are compared exactly (`1/2`, `0.5`, `\frac12`, `50\%`, `1 000/2000`, `\sqrt{8}` and `2\sqrt2`), units and
//! words after a number are dropped, tuples are compared part by part, and what is no number is compared as normalised
//! text. A percent sign on one side only is taken either way: `50%` equals `50` and `0.5`.

use super::super::exact::{ExactError, Fraction};
use super::value::Value;

/// Most characters of an answer that is looked at.
const MAX_ANSWER: usize = 512;
const MAX_DEPTH: usize = 24;

/// The final answer of `text`: the last `\boxed{...}`, else what follows the last `####`, else what follows the last
/// "answer is" or "answer:", else the last number.
pub fn final_answer(text: &str) -> Option<String> {
    if let Some(boxed) = last_boxed(text) {
        return Some(boxed.trim().to_owned());
    }
    if let Some((_, rest)) = text.rsplit_once("####") {
        return Some(rest.lines().next().unwrap_or_default().trim().to_owned()).filter(|a| !a.is_empty());
    }
    let lower = text.to_ascii_lowercase();
    for mark in ["answer is", "answer:"] {
        if let Some(at) = lower.rfind(mark) {
            let rest = text[at + mark.len()..].lines().next().unwrap_or_default();
            let rest = rest.trim_matches([' ', ':', '.', '*', '$']);
            if !rest.is_empty() {
                return Some(rest.to_owned());
            }
        }
    }
    last_number(text)
}

fn last_boxed(text: &str) -> Option<&str> {
    let at = text.rfind("\\boxed")?;
    let rest = text[at + "\\boxed".len()..].trim_start();
    let Some(inner) = rest.strip_prefix('{') else { return rest.split_whitespace().next() };
    let mut depth = 1;
    for (i, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&inner[..i]);
        }
    }
    None
}

fn last_number(text: &str) -> Option<String> {
    let part = |c: char| c.is_ascii_digit() || matches!(c, '.' | ',' | '/');
    let end = text.rfind(|c: char| c.is_ascii_digit())? + 1;
    let start = text[..end]
        .rfind(|c| !part(c))
        .map_or(0, |at| at + text[at..].chars().next().map_or(1, char::len_utf8));
    let start = if text[..start].ends_with('-') { start - 1 } else { start };
    Some(text[start..end].trim_start_matches([',', '.', '/']).to_owned())
}

/// Whether two answers are equal under the rules at the top of this file.
pub fn equivalent(said: &str, expected: &str) -> bool {
    if said.chars().count() > MAX_ANSWER || expected.chars().count() > MAX_ANSWER {
        return false;
    }
    let (a, b) = (normalised(said), normalised(expected));
    if a == b {
        return !a.is_empty();
    }
    match (parts(&a), parts(&b)) {
        (Some(x), Some(y)) => {
            return x.len() == y.len() && x.iter().zip(&y).all(|(x, y)| equivalent(x, y));
        }
        (None, None) => {}
        _ => return false,
    }
    let (Ok((x, x_percent)), Ok((y, y_percent))) = (value(&a), value(&b)) else { return false };
    let hundredth = |v: &Value| Fraction::new(1, 100).and_then(|h| v.times(&Value::fraction(h)));
    match (x_percent, y_percent) {
        (true, false) => x == y || hundredth(&x).is_ok_and(|x| x == y),
        (false, true) => x == y || hundredth(&y).is_ok_and(|y| x == y),
        _ => x == y,
    }
}

/// LaTeX and typography in one plain form: no spaces at the ends, no dollar signs, `\left`, `\text{...}` and thousands
/// separators.
fn normalised(text: &str) -> String {
    let mut out = text.trim().trim_end_matches(['.', ',', ';']).to_owned();
    for (from, to) in [
        ("\\$", ""),
        ("$", ""),
        ("\\left", ""),
        ("\\right", ""),
        ("\\!", ""),
        ("\\,", ""),
        ("\\;", " "),
        ("\\ ", " "),
        ("~", " "),
        ("dfrac", "frac"),
        ("tfrac", "frac"),
        ("cfrac", "frac"),
        ("\\cdot", "*"),
        ("\\times", "*"),
        ("\\div", "/"),
        ("\\%", "%"),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\degree", ""),
        ("\\pi", "π"),
        ("−", "-"),
        ("×", "*"),
        ("÷", "/"),
        ("£", ""),
        ("€", ""),
    ] {
        out = out.replace(from, to);
    }
    let out = without_text(&out);
    let out = out.rsplit_once('=').map_or(out.as_str(), |(_, right)| right);
    without_thousands(out.trim()).to_lowercase()
}

/// Drops `\text{...}`, `\mathrm{...}` and `\mbox{...}` after a number (units); alone, their content is the answer.
fn without_text(text: &str) -> String {
    let mut out = text.to_owned();
    for command in ["\\text{", "\\mathrm{", "\\mbox{", "\\textbf{"] {
        while let Some(at) = out.find(command) {
            let Some(length) = out[at + command.len()..].find('}') else { break };
            let inner = out[at + command.len()..at + command.len() + length].to_owned();
            let kept = if out[..at].trim().is_empty() { inner } else { String::new() };
            let mut end = at + command.len() + length + 1;
            if kept.is_empty() {
                // The power of a unit belongs to the unit.
                let power = ["^2", "^3", "^{2}", "^{3}"].into_iter().find(|p| out[end..].starts_with(p));
                end += power.map_or(0, str::len);
            }
            out.replace_range(at..end, &kept);
        }
    }
    out
}

/// `1,234,567` and `1 234` without their separators; other commas stay, because they part a tuple.
fn without_thousands(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let digit = |i: usize| characters.get(i).is_some_and(char::is_ascii_digit);
    let separates = |i: usize| {
        matches!(characters[i], ',' | ' ')
            && i > 0
            && digit(i - 1)
            && (1..=3).all(|k| digit(i + k))
            && !digit(i + 4)
            && characters.get(i + 4) != Some(&'/')
    };
    (0..characters.len()).filter(|i| !separates(*i)).map(|i| characters[i]).collect()
}

/// The parts of `(a, b)`, `[a, b)` or `a, b`; `None` for a single thing. Brackets of different kinds part ways.
fn parts(text: &str) -> Option<Vec<String>> {
    let open = text.chars().next().filter(|c| "([{".contains(*c));
    let close = text.chars().last().filter(|c| ")]}".contains(*c));
    let inner = if open.is_some() && close.is_some() { &text[1..text.len() - 1] } else { text };
    let (mut depth, mut all, mut last) = (0_i32, Vec::new(), String::new());
    for c in inner.chars() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                all.push(std::mem::take(&mut last));
                continue;
            }
            _ => {}
        }
        if depth < 0 {
            return None;
        }
        last.push(c);
    }
    if all.is_empty() {
        return None;
    }
    all.push(last);
    // The kind of bracket is part of an interval.
    all.push(format!("{}{}", open.unwrap_or('('), close.unwrap_or(')')));
    Some(all)
}

/// The value of an answer and whether it carried a percent sign.
fn value(text: &str) -> Result<(Value, bool), ExactError> {
    let mut parser = Parser { characters: text.chars().collect(), at: 0, depth: 0 };
    let value = parser.sum()?;
    let percent = parser.take('%');
    let rest: String = parser.characters[parser.at..].iter().collect();
    let rest = rest.trim();
    // Only a unit may follow: words, without digits, that do not belong to a longer formula.
    let unit = rest.is_empty()
        || (rest.chars().all(|c| c.is_alphabetic() || " .^23/".contains(c))
            && rest.starts_with(char::is_alphabetic));
    let variable = rest.chars().count() == 1 && !matches!(rest, "m" | "g" | "s" | "l" | "h");
    if unit && !variable { Ok((value, percent)) } else { Err(parser.unexpected()) }
}

struct Parser {
    characters: Vec<char>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn spaces(&mut self) {
        while self.characters.get(self.at).is_some_and(|c| c.is_whitespace()) {
            self.at += 1;
        }
    }

    fn peek(&mut self) -> Option<char> {
        self.spaces();
        self.characters.get(self.at).copied()
    }

    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += usize::from(found);
        found
    }

    fn word(&mut self, word: &str) -> bool {
        self.spaces();
        let n = word.chars().count();
        let found = self.characters[self.at..].iter().take(n).copied().eq(word.chars());
        self.at += if found { n } else { 0 };
        found
    }

    fn unexpected(&self) -> ExactError {
        let found = self.characters.get(self.at).map_or_else(|| "end".to_owned(), |c| format!("{c:?}"));
        ExactError::Syntax { found, at: self.at }
    }

    fn sum(&mut self) -> Result<Value, ExactError> {
        let mut sum = self.product()?;
        loop {
            if self.take('+') {
                sum = sum.plus(&self.product()?)?;
            } else if self.take('-') {
                sum = sum.plus(&self.product()?.negated())?;
            } else {
                return Ok(sum);
            }
        }
    }

    fn product(&mut self) -> Result<Value, ExactError> {
        let mut product = self.power()?;
        loop {
            if self.take('*') {
                product = product.times(&self.power()?)?;
            } else if self.take('/') {
                product = product.over(&self.power()?)?;
            } else if self.starts_factor() {
                // 2\sqrt{3}, 2π, 3(4): a product without a sign.
                product = product.times(&self.power()?)?;
            } else {
                return Ok(product);
            }
        }
    }

    fn starts_factor(&mut self) -> bool {
        matches!(self.peek(), Some('(' | 'π' | '√')) || {
            let rest: String = self.characters[self.at..].iter().take(5).collect();
            rest == "\\sqrt" || rest == "\\frac" || rest.starts_with("sqrt")
        }
    }

    fn power(&mut self) -> Result<Value, ExactError> {
        let base = self.factor()?;
        if !self.take('^') {
            return Ok(base);
        }
        let exponent = self.group()?.as_fraction().filter(|e| e.denominator() == 1);
        base.power(exponent.ok_or(ExactError::Overflow)?.numerator())
    }

    /// `{...}`, or one factor as in `\frac12`.
    fn group(&mut self) -> Result<Value, ExactError> {
        if self.take('{') {
            let inner = self.sum()?;
            return if self.take('}') { Ok(inner) } else { Err(self.unexpected()) };
        }
        match self.peek() {
            Some(c) if c.is_ascii_digit() => {
                self.at += 1;
                Ok(Value::fraction(Fraction::decimal(&c.to_string())?))
            }
            _ => self.factor(),
        }
    }

    fn factor(&mut self) -> Result<Value, ExactError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(ExactError::TooLarge { limit: MAX_ANSWER });
        }
        let value = self.factor_inside();
        self.depth -= 1;
        value
    }

    fn factor_inside(&mut self) -> Result<Value, ExactError> {
        if self.take('-') {
            return Ok(self.power()?.negated());
        }
        if self.take('+') {
            return self.power();
        }
        if self.take('π') || self.word("pi") {
            return Ok(Value::pi());
        }
        if self.word("\\frac") {
            let above = self.group()?;
            return above.over(&self.group()?);
        }
        if self.word("\\sqrt") || self.word("sqrt") || self.take('√') {
            return self.group()?.root();
        }
        for (open, close) in [('(', ')'), ('{', '}')] {
            if self.take(open) {
                let inner = self.sum()?;
                return if self.take(close) { Ok(inner) } else { Err(self.unexpected()) };
            }
        }
        let number = self.number()?;
        self.mixed(number)
    }

    fn number(&mut self) -> Result<Fraction, ExactError> {
        self.spaces();
        let start = self.at;
        while self.characters.get(self.at).is_some_and(|c| c.is_ascii_digit() || *c == '.') {
            self.at += 1;
        }
        let text: String = self.characters[start..self.at].iter().collect();
        if text.is_empty() { Err(self.unexpected()) } else { Fraction::decimal(&text) }
    }

    /// `1 1/2` and `1\frac12` are one and a half.
    fn mixed(&mut self, whole: Fraction) -> Result<Value, ExactError> {
        let before = self.at;
        let is_whole = whole.denominator() == 1;
        let spaced = self.characters.get(self.at) == Some(&' ');
        if is_whole && self.word("\\frac") {
            let above = self.group()?;
            let part = above.over(&self.group()?)?;
            return Value::fraction(whole).plus(&part);
        }
        if is_whole && spaced && self.peek().is_some_and(|c| c.is_ascii_digit()) {
            let above = self.number()?;
            if self.take('/') {
                let part = above.over(self.number()?)?;
                return Ok(Value::fraction(whole.plus(part)?));
            }
        }
        self.at = before;
        Ok(Value::fraction(whole))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equal_answers_are_equal_however_they_are_spelt() {
        for (a, b) in [
            ("1/2", "0.5"),
            ("\\frac{1}{2}", "0.50"),
            ("\\dfrac12", "2/4"),
            ("50\\%", "50%"),
            ("50%", "0.5"),
            ("50", "50%"),
            ("1,234", "1234"),
            ("1,234,567.0", "1234567"),
            ("$18", "18"),
            ("18 dollars", "18"),
            ("18\\text{ cm}^2", "18 cm^2"),
            ("72^\\circ", "72"),
            ("2\\sqrt{3}", "\\sqrt{12}"),
            ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"),
            ("3\\pi", "3π"),
            ("1\\frac{1}{2}", "1.5"),
            ("1 1/2", "3/2"),
            ("x = 5", "5"),
            ("(1, 2)", "(1,2)"),
            ("\\left( \\frac12, -3 \\right)", "(0.5, -3)"),
            ("-\\frac{2}{3}", "-2/3"),
            ("2^{10}", "1024"),
            ("\\text{Tuesday}", "tuesday"),
            ("10 m/s", "10"),
            (".5", "0.5"),
            ("1+\\sqrt{2}", "\\sqrt{2}+1"),
        ] {
            assert!(equivalent(a, b), "{a} = {b}");
            assert!(equivalent(b, a), "{b} = {a}");
        }
    }

    #[test]
    fn different_answers_are_different() {
        for (a, b) in [
            ("1/2", "1/3"),
            ("0.333", "1/3"),
            ("5", "50%"),
            ("12", "1,2"),
            ("(1,2)", "(2,1)"),
            ("(1,2)", "[1,2]"),
            ("(1,2)", "1"),
            ("2\\sqrt{3}", "3\\sqrt{2}"),
            ("\\pi", "3.14"),
            ("5x", "5"),
            ("", ""),
            ("-3", "3"),
            ("1/0", "0"),
            ("tuesday", "monday"),
        ] {
            assert!(!equivalent(a, b), "{a} / {b}");
        }
    }

    #[test]
    fn the_final_answer_is_found() {
        for (text, want) in [
            ("so \\boxed{\\frac{1}{2}} or rather \\boxed{3^{2}}.", Some("3^{2}")),
            ("5+5=10\n#### 10\n", Some("10")),
            ("The answer is **42**.", Some("42")),
            ("first 3, then -4.5 metres", Some("-4.5")),
            ("it is 1,250", Some("1,250")),
            ("no number", None),
            ("\\boxed{unclosed", None),
        ] {
            assert_eq!(final_answer(text).as_deref(), want, "{text}");
        }
    }

    proptest! {
        #[test]
        fn fractions_equal_themselves_in_every_spelling(n in -999_i64..999, d in 1_i64..99, k in 1_i64..9) {
            let latex = format!("\\frac{{{}}}{{{}}}", n * k, d * k);
            let (same, next) = (format!("{n}/{d}"), format!("{}/{d}", n + 1));
            prop_assert!(equivalent(&latex, &same) && !equivalent(&latex, &next));
            let off = equivalent(&format!("{n}"), &format!("{}", n + 1));
            prop_assert!(!off);
        }

        #[test]
        fn nothing_makes_it_panic(a in "\\PC{0,40}", b in "[-\\\\a-z{}^%$0-9,./ ()√π]{0,40}") {
            _ = (equivalent(&a, &b), final_answer(&a), final_answer(&b));
        }
    }
}
