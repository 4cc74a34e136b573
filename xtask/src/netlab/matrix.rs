//! Every kind of site calls every kind of site, over every transport, many times.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use anyhow::Result;

use super::lab::Lab;
use super::nat::NatKind;
use super::node::{Program, Transport};
use super::statistics::{Pair, Run};

/// Which pairs, how often, how many at a time.
#[derive(Debug)]
pub(crate) struct Matrix {
    pub(crate) from: Vec<NatKind>,
    pub(crate) to: Vec<NatKind>,
    pub(crate) transports: Vec<Transport>,
    pub(crate) runs: usize,
    pub(crate) jobs: usize,
}

/// The caller's kind, the answerer's, and what they speak.
type Cell = (NatKind, NatKind, Transport);

impl Matrix {
    /// Runs everything. `told` hears of each run that gave no report.
    pub(crate) fn run(
        &self,
        lab: &mut Lab,
        program: &Program,
        vias: &dyn Fn(Transport) -> Vec<String>,
        told: &(dyn Fn(&str) + Sync),
    ) -> Result<Vec<Pair>> {
        let mut sites = HashMap::new();
        for (side, kinds) in [&self.from, &self.to].into_iter().enumerate() {
            for kind in kinds {
                sites.insert((side, *kind), lab.add(*kind)?);
            }
        }
        let vias: HashMap<&str, Vec<String>> = self.transports.iter().map(|t| (t.name(), vias(*t))).collect();
        let todo: Mutex<VecDeque<(Cell, usize)>> = Mutex::new(self.todo());
        let done: Mutex<HashMap<Cell, Vec<Option<Run>>>> = Mutex::default();
        let lab = &*lab;
        std::thread::scope(|scope| {
            for _ in 0..self.jobs {
                scope.spawn(|| {
                    while let Some((cell, run)) = next(&todo) {
                        let (from, to, transport) = cell;
                        let name = format!("{}-{}-{}-{run}", from.name(), to.name(), transport.name());
                        let vias: Vec<&str> = vias[transport.name()].iter().map(String::as_str).collect();
                        let attempt = || {
                            let answerer = program.answerer(
                                lab.get(sites[&(1, to)]),
                                &vias,
                                transport,
                                &format!("{name}-b"),
                            )?;
                            let call = (&vias[..], answerer.peer.as_str());
                            let told = (format!("{name}-a"), []);
                            program.call(lab.get(sites[&(0, from)]), call, transport, (&told.0, &told.1))
                        };
                        let result = attempt().map_err(|error| told(&format!("{name}: {error:#}"))).ok();
                        done.lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .entry(cell)
                            .or_default()
                            .push(result);
                    }
                });
            }
        });
        let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        let pair = |cell: Cell| {
            let runs = done.get(&cell).map_or(&[][..], Vec::as_slice);
            Pair::of(cell.0.name(), cell.1.name(), cell.2.name(), runs)
        };
        Ok(self.cells().map(pair).collect())
    }

    fn cells(&self) -> impl Iterator<Item = Cell> + '_ {
        self.transports.iter().flat_map(move |transport| {
            self.from.iter().flat_map(move |from| self.to.iter().map(move |to| (*from, *to, *transport)))
        })
    }

    /// Once round all cells after the other, so that neighbours in time are seldom neighbours in place.
    fn todo(&self) -> VecDeque<(Cell, usize)> {
        (0..self.runs).flat_map(|run| self.cells().map(move |cell| (cell, run))).collect()
    }
}

fn next<T>(queue: &Mutex<VecDeque<T>>) -> Option<T> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_has_its_runs_and_they_are_spread() {
        let matrix = Matrix {
            from: NatKind::ALL.to_vec(),
            to: NatKind::ALL.to_vec(),
            transports: vec![Transport::Quic, Transport::Tcp],
            runs: 3,
            jobs: 1,
        };
        let todo = matrix.todo();
        assert_eq!(todo.len(), 4 * 4 * 2 * 3);
        let mut times: HashMap<Cell, Vec<usize>> = HashMap::new();
        for (at, (cell, _)) in todo.into_iter().enumerate() {
            times.entry(cell).or_default().push(at);
        }
        assert!(times.values().all(|at| at.len() == 3 && at.windows(2).all(|w| w[1] - w[0] == 32)));
    }
}
