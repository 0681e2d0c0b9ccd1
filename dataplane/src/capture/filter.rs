//! Filters of captures: libpcap's language, compiled and run by libpcap.

#[cfg(not(feature = "libpcap"))]
use std::convert::Infallible;

/// A filter. Each worker has its own.
#[cfg(feature = "libpcap")]
pub(crate) struct Filter(pcap::BpfProgram);

/// Without libpcap there are none.
#[cfg(not(feature = "libpcap"))]
pub(crate) struct Filter(Infallible);

impl std::fmt::Debug for Filter {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Filter").finish_non_exhaustive()
    }
}

#[cfg(feature = "libpcap")]
impl Filter {
    /// Compiles an expression of pcap-filter(7).
    ///
    /// # Errors
    /// What libpcap says of it.
    pub(crate) fn compile(expression: &str) -> Result<Self, String> {
        let says = |error: pcap::Error| match error {
            pcap::Error::PcapError(text) => text,
            other => other.to_string(),
        };
        let ethernet = pcap::Capture::dead(pcap::Linktype::ETHERNET).map_err(says)?;
        ethernet.compile(expression, true).map(Self).map_err(says)
    }

    /// Whether it wants a frame, all of which is given.
    pub(crate) fn matches(&self, frame: &[u8]) -> bool {
        self.0.filter(frame)
    }
}

#[cfg(not(feature = "libpcap"))]
impl Filter {
    /// Refuses an expression.
    ///
    /// # Errors
    /// Always.
    pub(crate) fn compile(_: &str) -> Result<Self, String> {
        Err("this program was built without libpcap (feature libpcap)".into())
    }

    /// Whether it wants a frame.
    pub(crate) fn matches(&self, _: &[u8]) -> bool {
        match self.0 {}
    }
}
