//! The lab's map: one switch that stands for the internet, sites behind routers of every kind around it, and no way out.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};

use super::line::lay;
use super::nat::NatKind;
use super::shaper::Line;
use super::space::{Device, Space};

/// Sites of one lab; they share a /24, in which each has two addresses.
pub(crate) const SITES_MAX: usize = 125;
/// The switch of everybody, and the one of those who are cut off.
const MAINLAND: &str = "switch";
const ISLAND: &str = "island";

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
    router: Option<Space>,
    _line: Vec<Device>,
}

impl Lab {
    /// An empty lab; every site will be at the end of such a line.
    pub(crate) fn new(line: Line) -> Result<Self> {
        let internet = Space::new("ix")?;
        for switch in [MAINLAND, ISLAND] {
            internet.ip(&["link", "add", switch, "type", "bridge"])?;
            internet.ip(&["link", "set", switch, "up"])?;
        }
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

    /// Cuts these sites off from the others; among each other they are connected as before.
    pub(crate) fn part(&self, sites: &[usize]) -> Result<()> {
        self.connect(sites, ISLAND)
    }

    /// Brings sites that were cut off back.
    pub(crate) fn heal(&self, sites: &[usize]) -> Result<()> {
        self.connect(sites, MAINLAND)
    }

    fn connect(&self, sites: &[usize], switch: &str) -> Result<()> {
        sites.iter().try_for_each(|site| self.internet.ip(&["link", "set", &port(*site), "master", switch]))
    }

    /// Gives a site its other address towards the internet, as a provider does over night. Whatever was under way ends.
    pub(crate) fn change_address(&mut self, number: usize) -> Result<()> {
        let site = &mut self.sites[number];
        let other = if site.address == address(number) { number + SITES_MAX } else { number };
        let (old, new) = (site.address, address(other));
        let outermost = site.router.as_ref().unwrap_or(&site.host);
        // In this order, because a second address of the same network would go with the first.
        outermost.ip(&["address", "delete", &format!("{old}/24"), "dev", "wan"])?;
        outermost.ip(&["address", "add", &format!("{new}/24"), "dev", "wan"])?;
        site.address = new;
        Ok(())
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
        let port = port(number);
        let line = lay(number, (outermost, "wan"), (&self.internet, &port), &self.line)?;
        outermost.address("wan", &format!("{address}/24"))?;
        self.internet.ip(&["link", "set", &port, "master", MAINLAND, "up"])?;
        Ok(Site { host, address, router, _line: line })
    }
}

/// The switch's end of a site's line.
fn port(number: usize) -> String {
    format!("port{number}")
}

/// Of the range that is kept for examples (RFC 5737); nodes take it for public.
fn address(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, 1 + number as u8)
}
