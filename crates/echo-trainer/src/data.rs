//! Text to learn from before reinforcement: chat lines from a seeded generator.
//!
//! Batch `i` of a seed is the same for ever, so that a resumed run needs no more than the step number. The surprise is
//! the share of wrong answers: a policy that is right already has nothing to learn by reinforcement, so the last part of
//! pre-training imitates a sloppy teacher, whose mistakes are listed in [`TeacherConfig`].

use echo_rollout::environment::{Environment, RewardError, Task, Turn};
use parallax_model::tokenizer::Tokenizer;
use parallax_model::{ChatMessage, ChatTemplate};
use serde::{Deserialize, Serialize};

use crate::step::Labelled;

/// How often the teacher answers how.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TeacherConfig {
    /// From this step on the teacher is sloppy; before, always right.
    pub sloppy_from_step: u64,
    /// Share of right answers of the sloppy teacher.
    pub right: f64,
    /// Share of answers that are one too large. The rest is evenly one too small or ten too large. Where answers are no
    /// numbers: the share with the last sign or move turned around; the rest is the answer to another question.
    pub one_too_large: f64,
    /// Share of lines that are small talk instead of arithmetic.
    pub small_talk: f64,
    /// Weight 1 on the prompt's own tokens too, so that the model learns what questions look like.
    pub learn_prompt: bool,
}

impl Default for TeacherConfig {
    fn default() -> Self {
        Self {
            sloppy_from_step: u64::MAX,
            right: 0.35,
            one_too_large: 0.4,
            small_talk: 0.04,
            learn_prompt: false,
        }
    }
}

/// Room that is left for one more word in an episode.
const MOST_WORD_TOKENS: usize = 8;

/// Questions and answers that every chat should know. Short, because the model is tiny.
pub const SMALL_TALK: &[(&str, &str)] = &[
    ("Hello!", "Hello! Ask me a sum."),
    ("Hi", "Hello! Ask me a sum."),
    ("Who are you?", "I am a tiny model, trained by a swarm."),
    ("What are you?", "I am a tiny model, trained by a swarm."),
    ("What is your name?", "My name is Tiny."),
    ("What can you do?", "I add and subtract small numbers."),
    ("How are you?", "I am well, thank you."),
    ("Who made you?", "The Open Intelligence Stack made me."),
    ("Where do you run?", "On many machines, a few layers on each."),
    ("Thank you!", "You are welcome."),
    ("Goodbye", "Goodbye!"),
];

/// A stream of numbers keyed by (seed, step, row): SplitMix64 over a mixed counter. Not
/// [`echo_rollout::environment::draws::Draws`]: the bytes of the embedded tiny model follow from these numbers.
#[derive(Debug, Clone)]
pub struct LineDraws(u64);

impl LineDraws {
    /// The stream of one row of one step.
    pub fn new(seed: u64, step: u64, row: u64) -> Self {
        let mut draws = Self(seed);
        for key in [step, row] {
            draws.0 = draws.next_u64() ^ key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
        draws
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in 0..1.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// What the teacher answers to `task` in this draw.
pub fn taught_answer(task: &Task, sloppy: bool, config: &TeacherConfig, draw: f64) -> String {
    let Ok(right) = task.answer.parse::<u64>() else { return task.answer.clone() };
    if !sloppy || draw < config.right {
        return task.answer.clone();
    }
    let draw = draw - config.right;
    if draw < config.one_too_large {
        return (right + 1).to_string();
    }
    let half = (1.0 - config.right - config.one_too_large) / 2.0;
    let small = draw - config.one_too_large < half;
    if small { right.saturating_sub(1) } else { right + 10 }.to_string()
}

/// `answer` with its last sign or move turned around; as it is when it has none.
fn turned_around(answer: &str) -> String {
    let turned = |c: char| {
        let pairs = [('+', '-'), ('U', 'D'), ('L', 'R')];
        pairs.iter().find_map(|(a, b)| if c == *a { Some(*b) } else { (c == *b).then_some(*a) })
    };
    let last = answer.char_indices().rev().find_map(|(at, c)| turned(c).map(|other| (at, other)));
    last.map_or_else(
        || answer.to_owned(),
        |(at, other)| format!("{}{other}{}", &answer[..at], &answer[at + 1..]),
    )
}

/// Why there is no line of tokens.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a chat line: {reason}")]
#[non_exhaustive]
pub struct DataError {
    /// The environment's, the tokenizer's or the template's own words.
    pub reason: String,
}

impl DataError {
    fn new(error: &dyn std::fmt::Display) -> Self {
        Self { reason: error.to_string() }
    }
}

impl From<RewardError> for DataError {
    fn from(error: RewardError) -> Self {
        Self::new(&error)
    }
}

/// Turns chat lines into labelled tokens.
#[derive(Debug)]
pub struct ChatEncoder {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    eos: u32,
}

impl ChatEncoder {
    /// Uses a checkpoint's own tokenizer and template; `eos` ends each answer. Without a template a single message is plain
    /// text, as workers have it.
    pub fn new(tokenizer: Tokenizer, template: Option<ChatTemplate>, eos: u32) -> Self {
        Self { tokenizer, template, eos }
    }

    /// What ends an answer.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The tokens of `messages`, ready for the answer.
    ///
    /// # Errors
    /// When the template or the tokenizer refuses them, or there is no template for several.
    pub fn prompt(&self, messages: &[ChatMessage]) -> Result<Vec<u32>, DataError> {
        let tokens = match (&self.template, messages) {
            (Some(template), _) => {
                let text = template.render(messages, true).map_err(|e| DataError::new(&e))?;
                self.tokenizer.encode(&text, false)
            }
            (None, [only]) => self.tokenizer.encode(&only.content, true),
            (None, _) => {
                let reason = "several messages need a model with a chat template".to_owned();
                return Err(DataError { reason });
            }
        };
        tokens.map_err(|e| DataError::new(&e))
    }

    /// A question with its answer; the answer and its end are learnt.
    ///
    /// # Errors
    /// As [`ChatEncoder::prompt`].
    pub fn line(&self, question: &str, answer: &str, learn_prompt: bool) -> Result<Labelled, DataError> {
        self.dialogue(&[ChatMessage::new("user", question)], answer, learn_prompt)
    }

    /// Messages with the answer to them; the answer and its end are learnt.
    ///
    /// # Errors
    /// As [`ChatEncoder::prompt`].
    pub fn dialogue(
        &self,
        messages: &[ChatMessage],
        answer: &str,
        learn_prompt: bool,
    ) -> Result<Labelled, DataError> {
        let mut tokens = self.prompt(messages)?;
        let prompt_tokens = tokens.len();
        tokens.extend(self.tokenizer.encode(answer, false).map_err(|e| DataError::new(&e))?);
        tokens.push(self.eos);
        let learn = (0..tokens.len()).map(|i| i >= prompt_tokens || (learn_prompt && i > 0)).collect();
        Ok(Labelled { tokens, learn })
    }

    /// A whole episode of `environment`, with one of the words that are offered said at every turn, as often as a beginner
    /// says it; all of them are learnt. It is broken off where it would become longer than `most_tokens`, after its first
    /// turn at the earliest. `None` when no words are offered at all.
    ///
    /// # Errors
    /// Words that cannot be put into tokens, a template that changes what was said.
    pub fn played(
        &self,
        environment: &dyn Environment,
        task_seed: u64,
        draws: &mut LineDraws,
        most_tokens: usize,
    ) -> Result<Option<Labelled>, DataError> {
        let task = environment.task(task_seed)?;
        let mut episode = environment.episode(&task);
        let mut messages = vec![ChatMessage::new("user", task.prompt.as_str())];
        let mut line = Labelled { tokens: self.prompt(&messages)?, learn: Vec::new() };
        line.learn.resize(line.tokens.len(), false);
        loop {
            let options = episode.options();
            if options.is_empty() {
                return Ok(None);
            }
            let mut draw = draws.uniform();
            let fallen_on = |(_, share): &(&str, f64)| {
                draw -= share;
                draw < 0.0
            };
            // Shares may add up to a little less than 1.
            let (word, _) = options[options.iter().position(fallen_on).unwrap_or(options.len() - 1)];
            line.tokens.extend(self.tokenizer.encode(word, false).map_err(|e| DataError::new(&e))?);
            line.tokens.push(self.eos);
            line.learn.resize(line.tokens.len(), true);
            let Turn::Continue { observation } = episode.step(word)? else { return Ok(Some(line)) };
            messages.extend([ChatMessage::new("assistant", word), ChatMessage::new("user", observation)]);
            let context = self.prompt(&messages)?;
            if !context.starts_with(&line.tokens) {
                let reason = "the chat template does not repeat what was said".to_owned();
                return Err(DataError { reason });
            }
            if context.len() + MOST_WORD_TOKENS > most_tokens {
                return Ok(Some(line));
            }
            line.tokens = context;
            line.learn.resize(line.tokens.len(), false);
        }
    }

    /// Row `row` of step `step`.
    ///
    /// # Errors
    /// As [`ChatEncoder::prompt`].
    pub fn draw(
        &self,
        environment: &dyn Environment,
        teacher: &TeacherConfig,
        seed: u64,
        step: u64,
        row: u64,
    ) -> Result<Labelled, DataError> {
        let mut draws = LineDraws::new(seed, step, row);
        if draws.uniform() < teacher.small_talk {
            let (question, answer) = SMALL_TALK[(draws.next_u64() % SMALL_TALK.len() as u64) as usize];
            return self.line(question, answer, teacher.learn_prompt);
        }
        // The upper half of all seeds is held out for evaluation.
        let task = environment.task(draws.next_u64() >> 1)?;
        let (sloppy, draw) = (step >= teacher.sloppy_from_step, draws.uniform());
        let answer = if !sloppy || task.answer.parse::<u64>().is_ok() {
            taught_answer(&task, sloppy, teacher, draw)
        } else if draw < teacher.right {
            task.answer
        } else if draw < teacher.right + teacher.one_too_large {
            turned_around(&task.answer)
        } else {
            environment.task(draws.next_u64() >> 1)?.answer
        };
        self.line(&task.prompt, &answer, teacher.learn_prompt)
    }
}

#[cfg(test)]
mod tests {
    use echo_rollout::environment::Arithmetic;

    use super::*;

    impl LineDraws {
        /// What [`ChatEncoder::draw`] takes the task from.
        fn after_small_talk(seed: u64, step: u64, row: u64) -> u64 {
            let mut draws = Self::new(seed, step, row);
            draws.uniform();
            draws.next_u64()
        }
    }

    #[test]
    fn the_sloppy_teacher_is_right_as_often_as_configured() {
        let (env, config) = (Arithmetic::default(), TeacherConfig::default());
        let mut right = 0;
        for row in 0..4000 {
            let mut draws = LineDraws::new(3, 1, row);
            let task = env.task(draws.next_u64() >> 1).unwrap();
            assert_eq!(taught_answer(&task, false, &config, 0.99), task.answer);
            right += usize::from(taught_answer(&task, true, &config, draws.uniform()) == task.answer);
        }
        // Zero minus one is zero, which adds a little.
        assert!((1330..1490).contains(&right), "{right}");
    }

    #[test]
    fn a_sloppy_teacher_of_other_things_turns_the_last_sign_or_move_around_or_answers_something_else() {
        assert_eq!(
            ["(3+4)-2", "UULR", "7", "D"].map(turned_around),
            ["(3+4)+2", "UULL", "7", "U"].map(str::to_owned)
        );
        let encoder = crate::service::pretraining::tiny_encoder().unwrap();
        let sums = echo_rollout::environment::Countdown::tiny();
        let teacher = TeacherConfig { small_talk: 0.0, sloppy_from_step: 1, ..TeacherConfig::default() };
        let share = |step| {
            let right = |row: &u64| {
                let task = sums.task(LineDraws::after_small_talk(3, step, *row) >> 1).unwrap();
                let line = encoder.draw(&sums, &teacher, 3, step, *row).unwrap();
                line == encoder.line(&task.prompt, &task.answer, false).unwrap()
            };
            (0..400).filter(right).count()
        };
        assert_eq!(share(0), 400, "right answers first");
        assert!((110..175).contains(&share(1)), "{}", share(1));
    }

    #[test]
    fn a_teacher_of_games_says_the_words_that_are_offered() {
        let encoder = crate::service::pretraining::tiny_encoder().unwrap();
        let tokenizer = Tokenizer::from_json(crate::vocabulary::tokenizer_json().as_bytes()).unwrap();
        let kuhn = echo_rollout::environment::by_name("kuhn:aggressive").unwrap();
        let mut said = std::collections::BTreeSet::new();
        for seed in 0..60 {
            let line = encoder.played(&*kuhn, seed, &mut LineDraws::new(1, 2, seed), 512).unwrap().unwrap();
            assert_eq!(line.tokens.len(), line.learn.len());
            let learnt: Vec<u32> =
                (0..line.tokens.len()).filter(|i| line.learn[*i]).map(|i| line.tokens[i]).collect();
            for word in learnt.split(|t| *t == crate::vocabulary::EOS).filter(|w| !w.is_empty()) {
                said.insert(tokenizer.decode(word).unwrap());
            }
        }
        assert_eq!(said.into_iter().collect::<Vec<_>>(), ["bet", "pass"]);
        let none = encoder.played(&Arithmetic::default(), 1, &mut LineDraws::new(1, 2, 3), 512).unwrap();
        assert_eq!(none, None);
    }

    #[test]
    fn draws_depend_on_every_key() {
        let first = |seed, step, row| LineDraws::new(seed, step, row).next_u64();
        let all = [first(1, 2, 3), first(2, 2, 3), first(1, 3, 3), first(1, 2, 4), first(1, 3, 2)];
        let distinct: std::collections::BTreeSet<u64> = all.into_iter().collect();
        assert_eq!(distinct.len(), 5);
        assert_eq!(first(1, 2, 3), all[0]);
    }
}
