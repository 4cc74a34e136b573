//! A level as a grid: walls, goals, boxes and the player, in the usual characters.

use std::collections::HashMap;
use std::fmt;

/// One step of the player.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// To the row above.
    Up,
    /// To the row below.
    Down,
    /// To the column before.
    Left,
    /// To the column after.
    Right,
}

impl Move {
    /// All four, in the order in which the solver tries them.
    pub const ALL: [Self; 4] = [Self::Up, Self::Down, Self::Left, Self::Right];

    /// `U`, `D`, `L` or `R`.
    pub fn letter(self) -> &'static str {
        match self {
            Self::Up => "U",
            Self::Down => "D",
            Self::Left => "L",
            Self::Right => "R",
        }
    }

    /// The move that a letter of either case stands for.
    pub fn from_letter(letter: char) -> Option<Self> {
        Self::ALL.into_iter().find(|m| m.letter().starts_with(letter.to_ascii_uppercase()))
    }
}

/// Why a picture or a list of squares is no level.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LevelError {
    /// A character without a meaning.
    #[error("character {found:?} in row {row}; a level has # . $ * @ + and spaces")]
    Character {
        /// It.
        found: char,
        /// Counted from 0.
        row: usize,
    },
    /// Something in a list of squares that is none.
    #[error(
        "{found:?} in a list of squares; it has parts like #r1u1 .r3d2 $r0d1 @a1, all inside of the border"
    )]
    Square {
        /// It.
        found: String,
    },
    /// Counts that do not make a level.
    #[error(
        "{players} players, {boxes} boxes and {goals} goals; one player and as many boxes as goals are needed"
    )]
    Counts {
        /// `@` and `+`.
        players: usize,
        /// `$` and `*`.
        boxes: usize,
        /// `.`, `*` and `+`.
        goals: usize,
    },
    /// The border must be wall, so that nothing leaves the grid.
    #[error("the border must be wall all around")]
    Border,
}

/// A position of the game. Squares are numbered row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Level {
    width: usize,
    walls: Vec<bool>,
    goals: Vec<usize>,
    boxes: Vec<usize>,
    player: usize,
}

impl Level {
    /// A room with a wall around it and nothing inside; [`Level::place`] makes it a level.
    pub(super) fn room(width: usize, height: usize) -> Self {
        let border = |at: usize| {
            let (row, column) = (at / width, at % width);
            row == 0 || column == 0 || row + 1 == height || column + 1 == width
        };
        let walls = (0..width * height).map(border).collect();
        Self { width, walls, goals: Vec::new(), boxes: Vec::new(), player: 0 }
    }

    pub(super) fn set_wall(&mut self, at: usize) {
        self.walls[at] = true;
    }

    pub(super) fn place(&mut self, mut goals: Vec<usize>, mut boxes: Vec<usize>, player: usize) {
        goals.sort_unstable();
        boxes.sort_unstable();
        (self.goals, self.boxes, self.player) = (goals, boxes, player);
    }

    /// Inner walls, goals and boxes by their way from the player, and the player's own square, as in
    /// `#r1u1r2d0 .r3d2 $r2u1 @a1`: so many columns to the right or left and rows down or up (0 is `r` and `d`), then a letter
    /// for the column and a digit for the row, both counted from the upper left square inside of the border, for at most ten
    /// rows. Without inner walls there is no such part. What moves is always at the same distance from the end, where a small
    /// model finds it.
    pub(super) fn squares(&self) -> String {
        let walls: Vec<usize> = (0..self.walls.len()).filter(|at| self.walls[*at]).collect();
        let parts = [('#', &walls[..]), ('.', &self.goals[..]), ('$', &self.boxes[..])];
        let ways = |squares: &[usize]| squares.iter().filter_map(|at| self.way(*at)).collect::<String>();
        let parts = parts.map(|(kind, squares)| (kind, ways(squares))).into_iter();
        let mut written: Vec<String> =
            parts.filter(|(_, ways)| !ways.is_empty()).map(|(kind, ways)| format!("{kind}{ways}")).collect();
        written.extend(self.square(self.player).map(|named| format!("@{named}")));
        written.join(" ")
    }

    /// The name of a square inside of the border.
    fn square(&self, at: usize) -> Option<String> {
        let (column, row) = self.inside(at)?;
        Some(format!("{}{row}", char::from(b'a' + column as u8)))
    }

    /// How a square inside of the border is reached from the player's.
    fn way(&self, at: usize) -> Option<String> {
        let ((column, row), (from_column, from_row)) = (self.inside(at)?, self.inside(self.player)?);
        let across = if column < from_column { 'l' } else { 'r' };
        let along = if row < from_row { 'u' } else { 'd' };
        Some(format!("{across}{}{along}{}", column.abs_diff(from_column), row.abs_diff(from_row)))
    }

    /// Column and row of a square inside of the border, counted from the upper left one of these.
    fn inside(&self, at: usize) -> Option<(usize, usize)> {
        let (row, column) = (at / self.width, at % self.width);
        let inside =
            row > 0 && (row + 1) * self.width < self.walls.len() && column > 0 && column + 1 < self.width;
        inside.then(|| (column - 1, row - 1))
    }

    /// The level of these [`Level::squares`] in a room of `width` x `height`, border included, at most 12 each.
    ///
    /// # Errors
    /// Squares that are none, or counts that do not make a level.
    pub(super) fn from_squares(text: &str, width: usize, height: usize) -> Result<Self, LevelError> {
        let mut level = Self::room(width, height);
        let (players, others): (Vec<&str>, Vec<&str>) =
            text.split_whitespace().partition(|part| part.starts_with('@'));
        let unknown = |part: &str| LevelError::Square { found: part.chars().take(80).collect() };
        let &[player] = &players[..] else { return level.counted(players.len()) };
        let here = (0..width * height).find(|at| level.square(*at).is_some_and(|name| name == player[1..]));
        level.player = here.ok_or_else(|| unknown(player))?;
        let ways: HashMap<String, usize> =
            (0..width * height).filter_map(|at| Some((level.way(at)?, at))).collect();
        for part in others {
            let (kind, mut squares) = part.split_at_checked(1).ok_or_else(|| unknown(part))?;
            while !squares.is_empty() {
                let (way, rest) = squares.split_at_checked(4).ok_or_else(|| unknown(part))?;
                let at = *ways.get(way).ok_or_else(|| unknown(part))?;
                match kind {
                    "#" => level.set_wall(at),
                    "." => level.goals.push(at),
                    "$" => level.boxes.push(at),
                    _ => return Err(unknown(part)),
                }
                squares = rest;
            }
        }
        level.counted(players.len())
    }

    /// Itself with so many players, when the counts make a level.
    fn counted(self, players: usize) -> Result<Self, LevelError> {
        let (boxes, goals) = (self.boxes.len(), self.goals.len());
        if players != 1 || boxes == 0 || boxes != goals {
            return Err(LevelError::Counts { players, boxes, goals });
        }
        Ok(self)
    }

    /// Whether there is a wall.
    pub fn wall(&self, at: usize) -> bool {
        self.walls[at]
    }

    /// The boxes, in rising order.
    pub fn boxes(&self) -> &[usize] {
        &self.boxes
    }

    /// Where the player stands.
    pub fn player(&self) -> usize {
        self.player
    }

    /// How many boxes stand on goals.
    pub fn boxes_on_goals(&self) -> usize {
        self.boxes.iter().filter(|b| self.goals.contains(b)).count()
    }

    /// Puts player and boxes elsewhere.
    pub(super) fn set(&mut self, player: usize, boxes: &[usize]) {
        self.player = player;
        self.boxes.clear();
        self.boxes.extend_from_slice(boxes);
    }

    /// Whether all boxes do.
    pub fn solved(&self) -> bool {
        self.boxes_on_goals() == self.boxes.len()
    }

    fn next(&self, at: usize, step: Move) -> usize {
        match step {
            Move::Up => at - self.width,
            Move::Down => at + self.width,
            Move::Left => at - 1,
            Move::Right => at + 1,
        }
    }

    /// Moves the player, pushing a box where one can be pushed. Returns whether a box moved, or `None` when nothing did.
    pub fn step(&mut self, step: Move) -> Option<bool> {
        let to = self.next(self.player, step);
        if self.walls[to] {
            return None;
        }
        let pushed = self.boxes.iter().position(|b| *b == to);
        if let Some(index) = pushed {
            let beyond = self.next(to, step);
            if self.walls[beyond] || self.boxes.contains(&beyond) {
                return None;
            }
            self.boxes[index] = beyond;
            self.boxes.sort_unstable();
        }
        self.player = to;
        Some(pushed.is_some())
    }
}

impl std::str::FromStr for Level {
    type Err = LevelError;

    fn from_str(text: &str) -> Result<Self, LevelError> {
        let rows: Vec<&str> = text.lines().collect();
        let width = rows.iter().map(|r| r.chars().count()).max().unwrap_or(0);
        let mut level = Self { width, walls: Vec::new(), goals: Vec::new(), boxes: Vec::new(), player: 0 };
        let mut players = 0;
        for (row, line) in rows.iter().enumerate() {
            for found in line.chars().chain(std::iter::repeat(' ')).take(width) {
                let at = level.walls.len();
                level.walls.push(found == '#');
                if !"#.$*@+ ".contains(found) {
                    return Err(LevelError::Character { found, row });
                }
                if matches!(found, '.' | '*' | '+') {
                    level.goals.push(at);
                }
                if matches!(found, '$' | '*') {
                    level.boxes.push(at);
                }
                if matches!(found, '@' | '+') {
                    players += 1;
                    level.player = at;
                }
            }
        }
        let level = level.counted(players)?;
        let border = Self::room(width, rows.len());
        if border.walls.iter().zip(&level.walls).any(|(needed, is)| *needed && !is) {
            return Err(LevelError::Border);
        }
        Ok(level)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let square = |at: usize| {
            let (goal, stone, player) =
                (self.goals.contains(&at), self.boxes.contains(&at), self.player == at);
            match (self.walls[at], goal, stone, player) {
                (true, ..) => '#',
                (_, true, true, _) => '*',
                (_, false, true, _) => '$',
                (_, true, _, true) => '+',
                (_, false, _, true) => '@',
                (_, true, ..) => '.',
                _ => ' ',
            }
        };
        for row in 0..self.walls.len() / self.width.max(1) {
            let line: String = (0..self.width).map(|column| square(row * self.width + column)).collect();
            if row > 0 {
                writeln!(f)?;
            }
            write!(f, "{line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "#####\n#@$.#\n#   #\n#####";

    #[test]
    fn pictures_survive_and_moves_push() {
        let mut level: Level = SMALL.parse().unwrap();
        assert_eq!(level.to_string(), SMALL);
        assert_eq!(level.step(Move::Up), None);
        assert!(!level.solved());
        assert_eq!(level.step(Move::Right), Some(true));
        assert!(level.solved());
        assert_eq!(level.to_string(), "#####\n# @*#\n#   #\n#####");
        assert_eq!(level.step(Move::Right), None, "a box against a wall stays");
        assert_eq!(level.step(Move::Down), Some(false));
    }

    #[test]
    fn squares_are_the_picture_in_words() {
        let picture = "######\n#@   #\n# #$ #\n#  # #\n#   .#\n######";
        let mut level: Level = picture.parse().unwrap();
        assert_eq!(level.squares(), "#r1d1r2d2 .r3d3 $r2d1 @a0");
        assert_eq!(Level::from_squares(&level.squares(), 6, 6), Ok(level.clone()));
        assert_eq!(level.step(Move::Down), Some(false));
        assert_eq!(level.squares(), "#r1d0r2d1 .r3d2 $r2d0 @a1");
        assert_eq!([Move::Down, Move::Down, Move::Right].map(|step| level.step(step)), [Some(false); 3]);
        assert_eq!(level.squares(), "#r0u2r1u1 .r2d0 $r1u2 @b3");
        assert_eq!(Level::from_squares(&level.squares(), 6, 6), Ok(level));
        let plain: Level = SMALL.parse().unwrap();
        assert_eq!(plain.squares(), ".r2d0 $r1d0 @a0");
        assert_eq!(Level::from_squares(".r2d0 $r1d0 @a0", 5, 4), Ok(plain));
    }

    #[test]
    fn squares_that_are_no_level_are_named() {
        let error = |text: &str| Level::from_squares(text, 5, 4).unwrap_err();
        for text in
            [".r3d0 $r1d0 @a0", ".r2u1 $r1d0 @a0", ".r2 $r1d0 @a0", "xr2d0 $r1d0 @a0", "é0 @a0", "@d0", "@"]
        {
            assert!(matches!(error(text), LevelError::Square { .. }), "{text}");
        }
        for text in ["", ".r2d0 $r1d0", ".r2d0 @a0", ".r2d0 $r1d0 @a0 @b0"] {
            assert!(matches!(error(text), LevelError::Counts { .. }), "{text}");
        }
    }

    #[test]
    fn pictures_that_are_no_level_are_named() {
        let error = |text: &str| text.parse::<Level>().unwrap_err().to_string();
        assert!(error("###\n#x#\n###").contains("'x'"));
        assert!(error("#####\n#@@.#\n#####").contains("2 players"));
        assert!(error("#####\n @$.#\n#####").contains("border"));
    }
}
