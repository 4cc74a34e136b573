//! Rotation, the append to the paged store, and attention over it.
//!
//! The store of a layer is two buffers [pages * page tokens, K * D]: a sequence's key at position `p` is row
//! `table[p / page tokens] * page tokens + p % page tokens`. Rows of one sequence that follow each other are taken
//! together by tiles, so that a key is read once for several of them and for the query heads that share it. Keys are
//! taken in chunks that begin at multiples of [`CHUNK`], by different cubes, which leave a maximum, a sum and a weighted
//! sum of values each; a second kernel merges the chunks of a row in order.

pub(in crate::gpu) mod chunks;

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use cubecl::{client::Client, prelude::*};

use self::chunks::{CHUNK, Shape, UNITS, attend_chunk, copy_values, merge_chunks, rotate_append};
use super::{Ids, MOST_CUBES, Values, check_indices, grid};
use crate::attention::{RowRef, Scoring};
use crate::error::{KernelError, check_len, rows_of};

/// Shared memory that every device has for a cube, in words.
const SHARED_WORDS: usize = 4096;
/// Head rows that a cube takes together at most.
const HEAD_ROWS: usize = 8;
/// Values of partial results that are in memory at once: longer prompts are taken in several launches.
const PARTIAL_VALUES: usize = 16 << 20;

/// Heads of a layer: Q query heads, K key-value heads, D elements each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Q, a multiple of K.
    pub n_heads: usize,
    /// K.
    pub n_kv_heads: usize,
    /// D.
    pub head_dim: usize,
}

/// Elements of the largest head.
pub const HEAD_DIM_MAX: usize = 512;

impl Heads {
    fn check(&self, op: &'static str) -> Result<(), KernelError> {
        let Self { n_heads, n_kv_heads, head_dim } = *self;
        if n_kv_heads == 0 || n_heads == 0 || !n_heads.is_multiple_of(n_kv_heads) {
            let rule = "must be a positive multiple of the key-value heads";
            return Err(KernelError::BadDimension { op, what: "query heads", got: n_heads, rule });
        }
        if head_dim == 0 || head_dim > HEAD_DIM_MAX {
            let rule = "must be within 1..=HEAD_DIM_MAX";
            return Err(KernelError::BadDimension { op, what: "head dimension", got: head_dim, rule });
        }
        Ok(())
    }

    fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }
}

/// Keys and values of a layer: pages of `page_tokens` rows [K * D] each.
#[derive(Clone, Copy, Debug)]
pub struct Store<'a> {
    /// [pages * page tokens, K * D]
    pub keys: &'a Values,
    /// As the keys.
    pub values: &'a Values,
    /// Rows per page.
    pub page_tokens: usize,
}

/// The rows of a batch on the device: made once, used by every layer.
#[derive(Debug)]
pub struct DeviceRows {
    rows: Vec<RowRef>,
    /// Where the table of each sequence begins among the joined ones.
    table_starts: Vec<u32>,
    /// Page tables of the sequences, joined.
    tables: Ids,
    /// Keys that each row sees. [T]
    n_keys: Ids,
    /// Row of the store for each row's own key. [T]
    slots: Ids,
    /// Rows that the store must have.
    least_slots: usize,
    page_tokens: usize,
    /// The tiles of the rows, by the most rows of a tile; layers agree on that but for a few.
    tiles: Mutex<Vec<(usize, Arc<Tiles>)>>,
}

/// Runs of rows of one sequence, and the same on the device as the kernel reads them.
#[derive(Debug)]
struct Tiles {
    ranges: Vec<Range<usize>>,
    described: Ids,
}

impl DeviceRows {
    /// Uploads the rows and the page tables of their sequences.
    ///
    /// # Errors
    /// A row outside its sequence's pages, or of a sequence without table.
    pub fn new(
        client: &Client,
        rows: &[RowRef],
        tables: &[Vec<u32>],
        page_tokens: usize,
    ) -> Result<Self, KernelError> {
        let op = "device rows";
        let mut slots = Vec::with_capacity(rows.len());
        for row in rows {
            let pages = tables.get(row.seq).map_or(0, Vec::len);
            if row.n_keys == 0 || row.n_keys > pages * page_tokens {
                let limit = pages * page_tokens + 1;
                return Err(KernelError::OutOfRange { op, what: "number of keys", limit, got: row.n_keys });
            }
            let position = row.n_keys - 1;
            slots.push(
                tables[row.seq][position / page_tokens] as usize * page_tokens + position % page_tokens,
            );
        }
        let most_page = tables.iter().flatten().max().map_or(0, |page| *page as usize + 1);
        let starts = tables.iter().scan(0, |start, table| {
            let this = *start;
            *start += table.len() as u32;
            Some(this)
        });
        let ids = |values: &mut dyn Iterator<Item = usize>| {
            Ids::upload(client, &values.map(|v| v as u32).collect::<Vec<_>>())
        };
        Ok(Self {
            rows: rows.to_vec(),
            table_starts: starts.collect(),
            tables: Ids::upload(client, &tables.concat()),
            n_keys: ids(&mut rows.iter().map(|row| row.n_keys)),
            slots: ids(&mut slots.into_iter()),
            least_slots: most_page * page_tokens,
            page_tokens,
            tiles: Mutex::default(),
        })
    }

    /// Runs of at most `most` rows of one sequence.
    fn tiles(&self, client: &Client, most: usize) -> Arc<Tiles> {
        let mut made = self.tiles.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, tiles)) = made.iter().find(|(size, _)| *size == most) {
            return Arc::clone(tiles);
        }
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for (i, row) in self.rows.iter().enumerate() {
            match ranges.last_mut() {
                Some(tile) if tile.len() < most && self.rows[i - 1].seq == row.seq => tile.end = i + 1,
                _ => ranges.push(i..i + 1),
            }
        }
        let described = ranges.iter().flat_map(|tile| {
            let seq = self.rows[tile.start].seq;
            let most = self.rows[tile.clone()].iter().map(|row| row.n_keys).max().unwrap_or(0);
            [tile.start as u32, tile.len() as u32, self.table_starts[seq], most as u32]
        });
        let described = Ids::upload(client, &described.collect::<Vec<_>>());
        let tiles = Arc::new(Tiles { ranges, described });
        made.push((most, Arc::clone(&tiles)));
        tiles
    }

    fn check(&self, op: &'static str, store: &Store<'_>, heads: &Heads) -> Result<(), KernelError> {
        heads.check(op)?;
        let slots = rows_of(op, "keys", store.keys.len(), heads.kv_width())?;
        store.values.check(op, "values", store.keys.len())?;
        check_indices(op, "values of the store", store.keys.len())?;
        check_indices(op, "values of the rows", self.rows.len() * (heads.q_width() + 2 * heads.kv_width()))?;
        check_len(op, "tokens of a page", self.page_tokens, store.page_tokens)?;
        if slots < self.least_slots {
            let (what, limit) = ("page", slots / self.page_tokens);
            return Err(KernelError::OutOfRange {
                op,
                what,
                limit,
                got: self.least_slots / self.page_tokens,
            });
        }
        Ok(())
    }
}

/// How the heads of a batch are rotated.
#[derive(Debug)]
pub struct DeviceRotation {
    /// Cosine and sine of each pair. [T, pairs, 2]
    angles: Values,
    pairs: usize,
    interleaved: bool,
}

impl DeviceRotation {
    /// Uploads cosines and sines [T, pairs, 2].
    ///
    /// # Errors
    /// When there is no whole number of rows.
    pub fn new(
        client: &Client,
        angles: &[f32],
        pairs: usize,
        interleaved: bool,
    ) -> Result<Self, KernelError> {
        rows_of("device rotation", "angles", angles.len(), 2 * pairs)?;
        Ok(Self { angles: Values::upload(client, angles), pairs, interleaved })
    }
}

/// Rotates the queries and keys of `qkv` [T, (Q + 2K)·D], writes keys and values to the store, and returns the queries
/// [T, Q·D].
///
/// # Errors
/// When the lengths do not fit together.
pub fn append(
    client: &Client,
    qkv: &Values,
    heads: Heads,
    rotation: Option<&DeviceRotation>,
    rows: &DeviceRows,
    store: Store<'_>,
) -> Result<Values, KernelError> {
    let op = "append";
    rows.check(op, &store, &heads)?;
    let (n_rows, width) = (rows.rows.len(), heads.q_width() + 2 * heads.kv_width());
    qkv.check(op, "qkv", n_rows * width)?;
    let pairs = rotation.map_or(0, |r| r.pairs);
    if let Some(rotation) = rotation {
        rotation.angles.check(op, "angles", n_rows * 2 * pairs)?;
        if 2 * pairs > heads.head_dim {
            let rule = "must fit into a head twice";
            return Err(KernelError::BadDimension { op, what: "rotated pairs", got: pairs, rule });
        }
    }
    let q = Values::empty(client, n_rows * heads.q_width());
    let angles = rotation.map_or(qkv, |r| &r.angles);
    // SAFETY: the buffers' lengths were compared with the shape, the slots with the store; units beyond the last element
    // write nothing.
    unsafe {
        rotate_append::launch_unchecked(
            client,
            grid((n_rows * width).div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            qkv.arg(),
            angles.arg(),
            rows.slots.arg(),
            q.arg(),
            store.keys.arg(),
            store.values.arg(),
            (n_rows * width) as u32,
            heads.q_width() as u32,
            heads.kv_width() as u32,
            heads.head_dim as u32,
            pairs as u32,
            rotation.is_some_and(|r| r.interleaved),
        );
    }
    Ok(q)
}

/// Attention of `q` [T, Q·D] over the store, [T, Q·D]. Query head `h` reads key-value head `h / (Q / K)`.
///
/// # Errors
/// When the lengths do not fit together.
pub fn attend(
    client: &Client,
    q: &Values,
    heads: Heads,
    rows: &DeviceRows,
    store: Store<'_>,
    scoring: &Scoring<'_>,
) -> Result<Values, KernelError> {
    let op = "attend";
    rows.check(op, &store, &heads)?;
    scoring.check(op, heads.n_heads)?;
    q.check(op, "q", rows.rows.len() * heads.q_width())?;
    let out = Values::empty(client, q.len());
    // Without sinks any buffer will do: the kernel does not read it.
    let sinks = scoring.sinks.map_or_else(|| q.clone(), |sinks| Values::upload(client, sinks));
    let lone = rows.rows.windows(2).all(|pair| pair[0].seq != pair[1].seq);
    let shape = shape(&heads, scoring, lone);
    let tiles = rows.tiles(client, shape.rows);
    let ranges = &tiles.ranges;
    let mut first = 0;
    while first < ranges.len() {
        // As many tiles as the memory for partial results has room for; always one.
        let (mut end, mut chunks) = (first, Span::default());
        while end < ranges.len() {
            let wider = chunks.with(scoring, &rows.rows[ranges[end].clone()]);
            let n_rows = ranges[end].end - ranges[first].start;
            let values = n_rows * heads.n_heads * wider.len() * (heads.head_dim + 2);
            if end > first && (values > PARTIAL_VALUES || end - first == MOST_CUBES) {
                break;
            }
            (end, chunks) = (end + 1, wider);
        }
        let launch = Launch { heads: &heads, rows, store: &store, scoring, shape, chunks };
        launch.run(client, q, &tiles, first..end, &sinks, &out);
        first = end;
    }
    Ok(out)
}

/// Chunks `first..end` of keys.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    first: usize,
    end: usize,
}

impl Span {
    /// With the chunks that these rows see.
    fn with(self, scoring: &Scoring<'_>, rows: &[RowRef]) -> Self {
        let first = rows.iter().map(|row| scoring.first_key(row.n_keys) / CHUNK).min().unwrap_or(0);
        let end = rows.iter().map(|row| row.n_keys.div_ceil(CHUNK)).max().unwrap_or(0);
        if self.end == 0 {
            Self { first, end }
        } else {
            Self { first: self.first.min(first), end: self.end.max(end) }
        }
    }

    fn len(self) -> usize {
        self.end - self.first
    }
}

/// How many heads and rows a cube takes: as many as shared memory has room for.
fn shape(heads: &Heads, scoring: &Scoring<'_>, lone: bool) -> Shape {
    let Heads { n_heads, n_kv_heads, head_dim } = *heads;
    let group = n_heads / n_kv_heads;
    let room = ((SHARED_WORDS - UNITS) / (head_dim + 2 * UNITS + 1)).clamp(1, HEAD_ROWS);
    let together = (1..=room.min(group)).rev().find(|n| group.is_multiple_of(*n)).unwrap_or(1);
    Shape {
        n_heads,
        n_kv_heads,
        head_dim,
        heads: together,
        rows: if lone { 1 } else { room / together },
        capped: scoring.softcap.is_some(),
        windowed: scoring.window.is_some(),
    }
}

struct Launch<'a> {
    heads: &'a Heads,
    rows: &'a DeviceRows,
    store: &'a Store<'a>,
    scoring: &'a Scoring<'a>,
    shape: Shape,
    chunks: Span,
}

impl Launch<'_> {
    fn run(
        &self,
        client: &Client,
        q: &Values,
        tiles: &Tiles,
        numbers: Range<usize>,
        sinks: &Values,
        out: &Values,
    ) {
        let Heads { n_heads, head_dim, .. } = *self.heads;
        let (rows, scoring, chunks) = (self.rows, self.scoring, self.chunks);
        let first_row = tiles.ranges[numbers.start].start;
        let n_rows = tiles.ranges[numbers.end - 1].end - first_row;
        let partial = Values::empty(client, n_rows * n_heads * chunks.len() * (head_dim + 2));
        let width = if head_dim.is_multiple_of(4) { 4 } else { 1 };
        let slices = n_heads / self.shape.heads;
        let window = scoring.window.map_or(0, |w| u32::try_from(w).unwrap_or(u32::MAX));
        // SAFETY: the rows' keys lie inside their tables, whose pages were compared with the store; the partial results
        // have a place for every row, head and chunk of the launch.
        unsafe {
            attend_chunk::launch_unchecked(
                client,
                CubeCount::Static(slices as u32, numbers.len() as u32, chunks.len() as u32),
                CubeDim::new_1d(UNITS as u32),
                width,
                q.arg(),
                self.store.keys.vectors(width),
                self.store.values.arg(),
                rows.tables.arg(),
                tiles.described.arg(),
                rows.n_keys.arg(),
                partial.arg(),
                numbers.start as u32,
                first_row as u32,
                chunks.first as u32,
                rows.page_tokens as u32,
                scoring.scale,
                scoring.softcap.unwrap_or(1.0),
                window,
                self.shape,
            );
            merge_chunks::launch_unchecked(
                client,
                grid((n_rows * n_heads * head_dim).div_ceil(UNITS)),
                CubeDim::new_1d(UNITS as u32),
                partial.arg(),
                rows.n_keys.arg(),
                sinks.arg(),
                out.arg(),
                (n_rows * n_heads * head_dim) as u32,
                first_row as u32,
                chunks.first as u32,
                chunks.len() as u32,
                window,
                scoring.sinks.is_some(),
                self.shape,
            );
        }
    }
}

/// Copies rows `from..from + n` of `width` over rows `to..to + n`, inside one buffer.
///
/// # Errors
/// When the rows leave the buffer or overlap.
pub fn copy_rows(
    client: &Client,
    data: &Values,
    width: usize,
    from: usize,
    to: usize,
    n: usize,
) -> Result<(), KernelError> {
    let op = "copy_rows";
    let rows = rows_of(op, "data", data.len(), width)?;
    let last = from.max(to) + n;
    if last > rows || from.abs_diff(to) < n {
        return Err(KernelError::OutOfRange { op, what: "last row", limit: rows + 1, got: last });
    }
    // SAFETY: both ranges of rows were compared with the buffer's.
    unsafe {
        copy_values::launch_unchecked(
            client,
            grid((n * width).div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            data.arg(),
            (from * width) as u32,
            (to * width) as u32,
            (n * width) as u32,
        );
    }
    Ok(())
}
