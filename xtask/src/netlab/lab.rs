//! The lab's map: one switch that stands for the internet, sites behind routers of every kind around it, and no way out.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};

use super::line::lay;
use super::nat::NatKind;
use super::shaper::Line;
use super::space::{Device, Space};

/// Sites of one lab; they share a /24.
const SITES_MAX: usize = 250;

/// A switch and the sites around it.
#[derive(Debug)]
pub(crate) struct Lab {
    // Dropped first: their devices end in the switch.
    sites: Vec<Site>,
    internet: Space,
    line: Line,
}

/// A host, with its router if it has one.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) host: Space,
    /// The address that the internet sees.
    pub(crate) address: Ipv4Addr,
    _router: Option<Space>,
    _line: Vec<Device>,
}

impl Lab {
    /// An empty lab; every site will be at the end of such a line.
    pub(crate) fn new(line: Line) -> Result<Self> {
        let internet = Space::new("ix")?;
        internet.ip(&["link", "add", "switch", "type", "bridge"])?;
        internet.ip(&["link", "set", "switch", "up"])?;
        Ok(Self { sites: Vec::new(), internet, line })
    }

    /// Adds a site; its number is the answer.
    pub(crate) fn add(&mut self, kind: NatKind) -> Result<usize> {
        let number = self.sites.len();
        anyhow::ensure!(number < SITES_MAX, "a lab has at most {SITES_MAX} sites");
        let site = self.site(number, kind).with_context(|| format!("site {number} ({})", kind.name()))?;
        self.sites.push(site);
        Ok(number)
    }

    pub(crate) fn get(&self, number: usize) -> &Site {
        &self.sites[number]
    }

    fn site(&self, number: usize, kind: NatKind) -> Result<Site> {
        let address = address(number);
        let host = Space::new(&format!("h{number}"))?;
        let router = match kind.rules() {
            None => None,
            Some(rules) => {
                let router = Space::new(&format!("r{number}"))?;
                let peer = ["peer", "name", "lan", "netns", router.name()];
                host.ip(&[&["link", "add", "eth", "type", "veth"], &peer[..]].concat())?;
                // Every local network has the same addresses, as in most homes.
                router.address("lan", "10.0.0.1/24")?;
                host.address("eth", "10.0.0.2/24")?;
                host.ip(&["route", "add", "default", "via", "10.0.0.1"])?;
                router.route(&rules)?;
                Some(router)
            }
        };
        let outermost = router.as_ref().unwrap_or(&host);
        let port = format!("port{number}");
        let line = lay(number, (outermost, "wan"), (&self.internet, &port), &self.line)?;
        outermost.address("wan", &format!("{address}/24"))?;
        self.internet.ip(&["link", "set", &port, "master", "switch", "up"])?;
        Ok(Site { host, address, _router: router, _line: line })
    }
}

/// Of the range that is kept for examples (RFC 5737); nodes take it for public.
fn address(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, 1 + number as u8)
}
