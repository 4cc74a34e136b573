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

    /// The other way.
    fn back(self) -> Self {
        match self {
            Self::Up => Self::Down,
            Self::Down => Self::Up,
            Self::Left => Self::Right,
            Self::Right => Self::Left,
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
        self.squares_from(self.player, '@', [('.', &self.goals), ('$', &self.boxes)])
    }

    /// The same as seen from the first box, as in `#r1u1 @l1d1 .r3d2 $b1`.
    pub(super) fn squares_from_box(&self) -> String {
        self.squares_from(self.boxes[0], '$', [('@', &[self.player]), ('.', &self.goals)])
    }

    fn squares_from(&self, from: usize, own: char, parts: [(char, &[usize]); 2]) -> String {
        let walls: Vec<usize> = (0..self.walls.len()).filter(|at| self.walls[*at]).collect();
        let ways =
            |squares: &[usize]| squares.iter().filter_map(|at| self.way(from, *at)).collect::<String>();
        let parts = [('#', &walls[..])].into_iter().chain(parts).map(|(kind, squares)| (kind, ways(squares)));
        let mut written: Vec<String> =
            parts.filter(|(_, ways)| !ways.is_empty()).map(|(kind, ways)| format!("{kind}{ways}")).collect();
        written.extend(self.square(from).map(|named| format!("{own}{named}")));
        written.join(" ")
    }

    /// The name of a square inside of the border.
    fn square(&self, at: usize) -> Option<String> {
        let (column, row) = self.inside(at)?;
        Some(format!("{}{row}", char::from(b'a' + column as u8)))
    }

    /// How a square inside of the border is reached from another one.
    fn way(&self, from: usize, at: usize) -> Option<String> {
        let ((column, row), (from_column, from_row)) = (self.inside(at)?, self.inside(from)?);
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

    /// The level of these [`Level::squares`] or [`Level::squares_from_box`] in a room of `width` x `height`, border included, at
    /// most 12 each.
    ///
    /// # Errors
    /// Squares that are none, or counts that do not make a level.
    pub(super) fn from_squares(text: &str, width: usize, height: usize) -> Result<Self, LevelError> {
        let mut level = Self::room(width, height);
        let unknown = |part: &str| LevelError::Square { found: part.chars().take(80).collect() };
        let mut parts: Vec<&str> = text.split_whitespace().collect();
        let Some(own) = parts.pop() else { return level.counted(0) };
        let (kind, named) = own.split_at_checked(1).ok_or_else(|| unknown(own))?;
        let from = (0..width * height).find(|at| level.square(*at).is_some_and(|name| name == named));
        let mut squares = vec![(kind, from.ok_or_else(|| unknown(own))?)];
        let ways: HashMap<String, usize> =
            (0..width * height).filter_map(|at| Some((level.way(squares[0].1, at)?, at))).collect();
        for part in parts {
            let (kind, mut rest) = part.split_at_checked(1).ok_or_else(|| unknown(part))?;
            while !rest.is_empty() {
                let (way, others) = rest.split_at_checked(4).ok_or_else(|| unknown(part))?;
                squares.push((kind, *ways.get(way).ok_or_else(|| unknown(part))?));
                rest = others;
            }
        }
        let mut players = 0;
        for (kind, at) in squares {
            match kind {
                "#" => level.set_wall(at),
                "." => level.goals.push(at),
                "$" => level.boxes.push(at),
                "@" => (level.player, players) = (at, players + 1),
                _ => return Err(unknown(kind)),
            }
        }
        level.boxes.sort_unstable();
        level.counted(players)
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

    /// Walks around the first box and pushes it one square, where the player can come to stand behind it and nothing is in its
    /// way. Returns whether it moved.
    pub fn push(&mut self, step: Move) -> bool {
        let stone = self.boxes[0];
        let behind = self.next(stone, step.back());
        if !self.reaches(behind) {
            return false;
        }
        let before = std::mem::replace(&mut self.player, behind);
        let pushed = self.step(step) == Some(true);
        if !pushed {
            self.player = before;
        }
        pushed
    }

    /// Whether the player can walk to a square without pushing.
    fn reaches(&self, end: usize) -> bool {
        let mut seen = self.walls.clone();
        self.boxes.iter().for_each(|stone| seen[*stone] = true);
        let mut open = vec![self.player];
        while let Some(at) = open.pop() {
            if at == end {
                return true;
            }
            if !std::mem::replace(&mut seen[at], true) {
                open.extend(Move::ALL.map(|step| self.next(at, step)).into_iter().filter(|to| !seen[*to]));
            }
        }
        false
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
        assert_eq!(plain.squares_from_box(), "@l1d0 .r1d0 $b0");
        assert_eq!(Level::from_squares("@l1d0 .r1d0 $b0", 5, 4), Ok(plain.clone()));
        assert_eq!(plain.squares(), ".r2d0 $r1d0 @a0");
        assert_eq!(Level::from_squares(".r2d0 $r1d0 @a0", 5, 4), Ok(plain));
    }

    #[test]
    fn a_push_walks_around_the_box_where_there_is_a_way() {
        let mut level: Level = "######\n#@   #\n# $# #\n#   .#\n######".parse().unwrap();
        assert!(!level.push(Move::Right), "a wall is in its way");
        assert!(level.push(Move::Down));
        assert_eq!(level.to_string(), "######\n#    #\n# @# #\n# $ .#\n######");
        assert!(!level.push(Move::Down), "the border is");
        assert!(!level.push(Move::Up), "nobody stands in the border");
        assert!(level.push(Move::Right) && level.push(Move::Right));
        assert!(level.solved());
        let mut shut: Level = "######\n#@#$.#\n#    #\n######".parse().unwrap();
        assert!(!shut.push(Move::Right), "a wall stands behind it");
        let mut corridor: Level = "######\n# @$.#\n######".parse().unwrap();
        assert!(!corridor.push(Move::Left), "no way past the box");
        assert_eq!(corridor.player(), 8);
    }

    #[test]
    fn squares_that_are_no_level_are_named() {
        let error = |text: &str| Level::from_squares(text, 5, 4).unwrap_err();
        for text in [
            ".r3d0 $r1d0 @a0",
            ".r2u1 $r1d0 @a0",
            ".r2 $r1d0 @a0",
            "xr2d0 $r1d0 @a0",
            "é0 @a0",
            "@d0",
            "@",
            "é",
            ".r2d0 $r1d0",
            ".r2d0 $r1d0 @a0 @b0",
        ] {
            assert!(matches!(error(text), LevelError::Square { .. }), "{text}");
        }
        for text in ["", ".r2d0 @a0", ".r2d0 @r1d0 @a0", ".r2d0 $a0"] {
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
