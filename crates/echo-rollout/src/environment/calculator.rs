//! Arithmetic that is too large to do in one's head, with a calculator as a tool: several turns, the tool's words masked
//! out of the loss.

use super::draws::{Draws, draw_on_side};
use super::exact::evaluate;
use super::{Environment, Episode, Reward, RewardError, Task, Turn};

const CONTEXT: &str = "echo-rollout calculator task v1";

/// "Compute (37*48)+112." A turn with `<calc>EXPRESSION</calc>` is answered with the value; a turn without it is the answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Calculator {
    /// Largest operand; the smallest is 2. Default: 99.
    pub max_operand: i64,
    /// Operations of one problem. Default: 2.
    pub operations: usize,
    /// How often the model may speak. Default: 4.
    pub turns: usize,
}

impl Default for Calculator {
    fn default() -> Self {
        Self { max_operand: 99, operations: 2, turns: 4 }
    }
}

impl Calculator {
    fn expression(&self, seed: u64) -> String {
        let draw = |draws: &mut Draws| {
            let operand = |draws: &mut Draws| draws.between(2, self.max_operand.max(2)).to_string();
            let mut text = operand(draws);
            for _ in 0..self.operations.clamp(1, 16) {
                let sign = ['+', '-', '*'][draws.below(3)];
                text = format!("({text}{sign}{})", operand(draws));
            }
            text[1..text.len() - 1].to_owned()
        };
        let drawn = draw_on_side(CONTEXT, seed, 1000, |d| Some(draw(d)), |text| text.clone().into_bytes());
        drawn.expect("every draw is an expression")
    }

    fn reward(&self, task: &Task, said: &str, calls: usize) -> Result<Reward, RewardError> {
        let correct = said.trim() == task.answer;
        let parts = vec![("correct".to_owned(), f32::from(correct)), ("calls".to_owned(), calls as f32)];
        Reward::new(f32::from(correct), parts, &self.reward_range())
    }
}

/// The last call of a turn.
fn call(said: &str) -> Option<&str> {
    let (_, rest) = said.rsplit_once("<calc>")?;
    rest.split_once("</calc>").map(|(expression, _)| expression.trim())
}

struct Session<'a> {
    rules: &'a Calculator,
    task: &'a Task,
    turn: usize,
    calls: usize,
}

impl Episode for Session<'_> {
    fn step(&mut self, said: &str) -> Result<Turn, RewardError> {
        self.turn += 1;
        let last = self.turn >= self.rules.turns.max(1);
        let Some(expression) = call(said).filter(|_| !last) else {
            return Ok(Turn::Done(self.rules.reward(self.task, said, self.calls)?));
        };
        self.calls += 1;
        let observation = match evaluate(expression) {
            Ok(evaluated) => evaluated.value.to_string(),
            Err(error) => format!("error: {error}"),
        };
        Ok(Turn::Continue { observation })
    }

    fn cut(&mut self) -> Result<Reward, RewardError> {
        self.rules.reward(self.task, "", self.calls)
    }
}

impl Environment for Calculator {
    fn name(&self) -> &str {
        "calculator"
    }

    fn task(&self, seed: u64) -> Result<Task, RewardError> {
        let expression = self.expression(seed);
        let answer = evaluate(&expression).map(|e| e.value.to_string()).unwrap_or_default();
        let prompt = format!(
            "Compute {expression}. To use the calculator write <calc>EXPRESSION</calc>. Else answer with the number only."
        );
        Ok(Task { seed, prompt, answer })
    }

    fn turns(&self) -> usize {
        self.turns.max(1)
    }

    fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
        Box::new(Session { rules: self, task, turn: 0, calls: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tool_gives_the_answer_and_errors_are_words() {
        let env = Calculator::default();
        for seed in 0..100 {
            let task = env.task(seed).unwrap();
            let expression = env.expression(seed);
            let mut session = env.episode(&task);
            let Turn::Continue { observation } = session.step(&format!("<calc>{expression}</calc>")).unwrap()
            else {
                panic!("a call continues")
            };
            assert_eq!(observation, task.answer);
            let Turn::Continue { observation } = session.step("<calc>1/0</calc>").unwrap() else {
                panic!("an error continues")
            };
            assert_eq!(observation, "error: division by zero");
            let Turn::Done(reward) = session.step(&task.answer).unwrap() else { panic!("an answer ends") };
            assert_eq!(reward.value(), 1.0);
            assert_eq!(reward.components()[1], ("calls".to_owned(), 2.0));
        }
    }

    #[test]
    fn the_last_turn_is_the_answer_whatever_it_says() {
        let env = Calculator { turns: 2, ..Calculator::default() };
        let task = env.task(1).unwrap();
        let mut session = env.episode(&task);
        assert!(matches!(session.step("<calc>1+1</calc>").unwrap(), Turn::Continue { .. }));
        assert!(matches!(session.step("<calc>1+1</calc>").unwrap(), Turn::Done(r) if r.value() == 0.0));
    }
}
