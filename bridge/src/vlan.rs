//! VLANs (IEEE 802.1Q): which frames a port takes, which VLAN they are in, and whether they leave
//! with a tag.
//!
//! ```text
//!   frame --PortVlans::admit--> Class { VLAN, tag that it came with }
//!                                 |                       forwarding database, floods: per VLAN
//!                                 +--PortVlans::retag--> keep, push, pop, replace: per destination
//! ```
//! A tag counts if it is of the port's own type, and is part of the payload if not: so a frame of a
//! customer, tagged or not, passes within a service VLAN as it is (802.1Q-2022, 15).

mod table;

use std::fmt;

use crate::DropReason;
pub use table::Vlans;

/// A VLAN: 1 to 4094, or 0 for the frames that no port has put into one. VLAN 4095 is reserved
/// (IEEE 802.1Q-2022, table 9-2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VlanId(u16);

impl VlanId {
    /// That of untagged frames of ports that say nothing of VLANs.
    pub const NONE: Self = Self(0);

    /// The greatest.
    pub const MAX: Self = Self(4094);

    /// The VLAN of this number; `None` from 4095 on.
    pub const fn new(number: u16) -> Option<Self> {
        if number <= Self::MAX.0 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// As a number.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The VLAN in the low twelve bits, which came from one.
    pub(crate) const fn from_bits(bits: u16) -> Self {
        Self(bits & 0xfff)
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// A set of VLANs.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct VlanSet([u64; WORDS]);

const WORDS: usize = 4096 / 64;

impl VlanSet {
    /// No VLAN.
    pub const EMPTY: Self = Self([0; WORDS]);

    /// All from 1 to 4094.
    pub fn all() -> Self {
        (1..=VlanId::MAX.0).map(VlanId).collect()
    }

    /// Adds a VLAN; false if it was there.
    pub fn insert(&mut self, vlan: VlanId) -> bool {
        let is_new = !self.contains(vlan);
        self.0[usize::from(vlan.0) / 64] |= 1 << (vlan.0 % 64);
        is_new
    }

    /// Whether a VLAN is there.
    #[inline]
    pub const fn contains(&self, vlan: VlanId) -> bool {
        self.0[vlan.0 as usize / 64 % WORDS] >> (vlan.0 % 64) & 1 != 0
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self == &Self::EMPTY
    }

    /// The VLANs, in order.
    pub fn iter(&self) -> impl Iterator<Item = VlanId> + '_ {
        (0..=VlanId::MAX.0)
            .map(VlanId)
            .filter(|vlan| self.contains(*vlan))
    }
}

impl FromIterator<VlanId> for VlanSet {
    fn from_iter<I: IntoIterator<Item = VlanId>>(vlans: I) -> Self {
        let mut set = Self::EMPTY;
        for vlan in vlans {
            set.insert(vlan);
        }
        set
    }
}

/// As `10,20-30`.
impl fmt::Display for VlanSet {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut vlans = self.iter().map(VlanId::get).peekable();
        let mut separator = "";
        while let Some(first) = vlans.next() {
            let mut last = first;
            while let Some(next) = vlans.next_if_eq(&(last + 1)) {
                last = next;
            }
            match last - first {
                0 => write!(out, "{separator}{first}")?,
                _ => write!(out, "{separator}{first}-{last}")?,
            }
            separator = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for VlanSet {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{{{self}}}")
    }
}

/// Which tags of frames say which VLAN they are in (IEEE 802.1Q-2022, table 9-1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TagType {
    /// C-TAG, 802.1Q.
    #[default]
    Customer,
    /// S-TAG, 802.1ad.
    Service,
}

impl TagType {
    /// The EtherType that such a tag begins with.
    #[inline]
    pub const fn ether_type(self) -> u16 {
        match self {
            Self::Customer => 0x8100,
            Self::Service => 0x88a8,
        }
    }
}

/// What becomes of frames without a tag, or with one of VLAN 0 (priority tags).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Native {
    /// They are dropped.
    #[default]
    Dropped,
    /// They are in this VLAN, whose frames leave without a tag.
    Untagged(VlanId),
    /// They are in this VLAN, whose frames leave with a tag.
    Tagged(VlanId),
}

/// Which VLANs a port is in, and how its frames tell them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortVlans {
    members: VlanSet,
    native: Native,
    /// Frames with a tag of this type are in its VLAN. `None` takes every frame for untagged.
    tag_type: Option<TagType>,
    /// Frames with a tag of a VLAN are taken: not by access ports (802.1Q-2022, 6.9, "Admit Only
    /// Untagged and Priority-tagged frames").
    takes_tagged: bool,
}

/// A port that says nothing of VLANs: it is in all of them, and its untagged frames in none. They
/// leave it as they came.
impl Default for PortVlans {
    fn default() -> Self {
        let mut members = VlanSet::all();
        members.insert(VlanId::NONE);
        Self {
            members,
            native: Native::Untagged(VlanId::NONE),
            tag_type: Some(TagType::Customer),
            takes_tagged: true,
        }
    }
}

impl PortVlans {
    /// A port of one VLAN, which knows nothing of it: an access port.
    pub fn access(vlan: VlanId) -> Self {
        Self {
            members: [vlan].into_iter().collect(),
            native: Native::Untagged(vlan),
            tag_type: Some(TagType::Customer),
            takes_tagged: false,
        }
    }

    /// A port whose frames, whatever tags they have, are in one service VLAN.
    pub fn tunnel(vlan: VlanId) -> Self {
        Self {
            tag_type: None,
            ..Self::access(vlan)
        }
    }

    /// A port whose frames have tags of their VLANs. It is in the native VLAN too.
    pub fn trunk(mut members: VlanSet, native: Native, tag_type: TagType) -> Self {
        if let Native::Untagged(vlan) | Native::Tagged(vlan) = native {
            members.insert(vlan);
        }
        Self {
            members,
            native,
            tag_type: Some(tag_type),
            takes_tagged: true,
        }
    }

    /// A port of no VLAN: nothing passes.
    const fn nowhere() -> Self {
        Self {
            members: VlanSet::EMPTY,
            native: Native::Dropped,
            tag_type: None,
            takes_tagged: false,
        }
    }

    /// The VLANs that it is in; VLAN 0 is among them if untagged frames are in none.
    pub fn members(&self) -> &VlanSet {
        &self.members
    }

    /// Whether frames of a VLAN leave the port.
    #[inline]
    pub fn contains(&self, vlan: VlanId) -> bool {
        self.members.contains(vlan)
    }

    /// The VLAN of its untagged frames.
    pub fn pvid(&self) -> Option<VlanId> {
        match self.native {
            Native::Dropped => None,
            Native::Untagged(vlan) | Native::Tagged(vlan) => Some(vlan),
        }
    }

    /// Whether frames of a VLAN that it is in leave it without a tag.
    #[inline]
    pub fn is_untagged(&self, vlan: VlanId) -> bool {
        self.native == Native::Untagged(vlan)
    }

    /// Whether a frame of this EtherType has a tag that tells its VLAN.
    #[inline]
    pub(crate) fn reads(&self, ether_type: u16) -> bool {
        self.tag_type
            .is_some_and(|tag| tag.ether_type() == ether_type)
    }

    /// Which VLAN a frame of the port is in that came without such a tag, or with the tag control
    /// information `tci` (IEEE 802.1Q-2022, 6.9.1).
    ///
    /// # Errors
    /// [`DropReason::VlanDenied`]: in none of its own.
    pub fn admit(&self, tci: Option<u16>) -> Result<Class, DropReason> {
        let tag = tci.zip(self.tag_type).map(|(tci, kind)| Tag { kind, tci });
        let vlan = match tci.map(|tci| tci & VID) {
            None | Some(0) => self.pvid(),
            Some(vid) => VlanId::new(vid).filter(|vlan| self.takes_tagged && self.contains(*vlan)),
        };
        let vlan = vlan.ok_or(DropReason::VlanDenied)?;
        Ok(Class { vlan, tag })
    }

    /// The VLAN of a frame of the port with this EtherType behind its addresses; `tci` as for
    /// [`Bridge::forward_in_vlans`](crate::Bridge::forward_in_vlans).
    ///
    /// # Errors
    /// It ends within its tag, or is not taken.
    pub fn vlan_of(
        &self,
        ether_type: u16,
        tci: impl FnOnce() -> Option<u16>,
    ) -> Result<VlanId, DropReason> {
        let tci = if self.reads(ether_type) {
            Some(tci().ok_or(DropReason::Runt)?)
        } else {
            None
        };
        self.admit(tci).map(|class| class.vlan)
    }

    /// What is to be done to a frame of a VLAN of the port, so that the port may have it.
    pub fn retag(&self, class: Class) -> Retag {
        // What is in no VLAN leaves as it came, with its priority.
        if class.vlan == VlanId::NONE {
            return Retag::Keep;
        }
        let leaves_untagged = self.is_untagged(class.vlan);
        let kind = self.tag_type.unwrap_or_default();
        match class.tag {
            None if leaves_untagged => Retag::Keep,
            None => Retag::Push(Tag::new(kind, class.vlan.0).bytes()),
            Some(_) if leaves_untagged => Retag::Pop,
            Some(tag) => {
                let new = Tag::new(kind, tag.tci & !VID | class.vlan.0);
                if new == tag {
                    Retag::Keep
                } else {
                    Retag::Replace(new.bytes())
                }
            }
        }
    }
}

/// The VLAN in a tag's control information; above it are the priority (PCP) and DEI (802.1Q-2022,
/// 9.6).
const VID: u16 = 0xfff;

/// Bytes of a tag.
pub const TAG_BYTES: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tag {
    kind: TagType,
    tci: u16,
}

impl Tag {
    const fn new(kind: TagType, tci: u16) -> Self {
        Self { kind, tci }
    }

    fn bytes(self) -> [u8; TAG_BYTES] {
        let [a, b] = self.kind.ether_type().to_be_bytes();
        let [c, d] = self.tci.to_be_bytes();
        [a, b, c, d]
    }
}

/// The VLAN that a frame is in, and the tag that it came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// The VLAN.
    pub vlan: VlanId,
    tag: Option<Tag>,
}

/// What is done to a frame's first tag, behind the addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Retag {
    /// Nothing.
    #[default]
    Keep,
    /// A tag comes in front of what follows the addresses.
    Push([u8; TAG_BYTES]),
    /// The tag goes.
    Pop,
    /// Another takes its place.
    Replace([u8; TAG_BYTES]),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vlan(number: u16) -> VlanId {
        VlanId::new(number).unwrap()
    }

    fn set(vlans: &[u16]) -> VlanSet {
        vlans.iter().map(|number| vlan(*number)).collect()
    }

    fn trunk(native: Native, tag_type: TagType) -> PortVlans {
        PortVlans::trunk(set(&[10, 20]), native, tag_type)
    }

    /// The VLAN of a frame with this TCI, if it is taken.
    fn admitted(port: &PortVlans, tci: Option<u16>) -> Option<u16> {
        port.admit(tci).ok().map(|class| class.vlan.get())
    }

    #[test]
    fn vlans_are_told_as_ranges() {
        assert_eq!(set(&[30, 1, 2, 3, 4094, 29]).to_string(), "1-3,29-30,4094");
        assert_eq!(VlanSet::all().to_string(), "1-4094");
        assert_eq!(VlanSet::all().len(), 4094);
        assert!(VlanId::new(4095).is_none() && VlanSet::EMPTY.is_empty());
    }

    /// IEEE 802.1Q-2022, 6.9: untagged and priority-tagged frames are in the port's own VLAN.
    #[test]
    fn frames_are_classified_by_their_tag_or_their_port() {
        let access = PortVlans::access(vlan(10));
        let native = trunk(Native::Untagged(vlan(20)), TagType::Customer);
        let strict = trunk(Native::Dropped, TagType::Customer);
        let cases = [
            // untagged, priority-tagged, VLAN 10, VLAN 11, 4095
            (access, [Some(10), Some(10), None, None, None]),
            (native, [Some(20), Some(20), Some(10), None, None]),
            (strict, [None, None, Some(10), None, None]),
            (
                PortVlans::default(),
                [Some(0), Some(0), Some(10), Some(11), None],
            ),
            (PortVlans::nowhere(), [None; 5]),
        ];
        for (port, expected) in cases {
            let tags = [None, Some(0xe000), Some(0x300a), Some(11), Some(0xffff)];
            assert_eq!(tags.map(|tci| admitted(&port, tci)), expected, "{port:?}");
        }
    }

    #[test]
    fn a_tag_of_another_type_is_payload() {
        let tunnel = PortVlans::tunnel(vlan(100));
        let service = trunk(Native::Dropped, TagType::Service);
        let customer = PortVlans::access(vlan(10));
        assert!(!tunnel.reads(0x8100) && !tunnel.reads(0x88a8));
        assert!(!service.reads(0x8100) && service.reads(0x88a8));
        assert!(customer.reads(0x8100) && !customer.reads(0x88a8));
    }

    #[test]
    fn a_frame_leaves_each_port_with_that_ports_tag() {
        let access = PortVlans::access(vlan(10));
        let customer = trunk(Native::Tagged(vlan(20)), TagType::Customer);
        let service = trunk(Native::Untagged(vlan(20)), TagType::Service);
        let untagged = access.admit(None).unwrap();
        let prioritised = access.admit(Some(0xe000)).unwrap();
        let tagged = customer.admit(Some(0x700a)).unwrap();
        let native = customer.admit(None).unwrap();
        let cases = [
            (
                untagged,
                [
                    Retag::Keep,
                    Retag::Push([0x81, 0, 0, 10]),
                    Retag::Push([0x88, 0xa8, 0, 10]),
                ],
            ),
            (
                prioritised,
                [
                    Retag::Pop,
                    Retag::Replace([0x81, 0, 0xe0, 10]),
                    Retag::Replace([0x88, 0xa8, 0xe0, 10]),
                ],
            ),
            (
                tagged,
                [
                    Retag::Pop,
                    Retag::Keep,
                    Retag::Replace([0x88, 0xa8, 0x70, 10]),
                ],
            ),
        ];
        for (class, expected) in cases {
            let ports = [&access, &customer, &service];
            assert_eq!(ports.map(|port| port.retag(class)), expected, "{class:?}");
        }
        assert_eq!(customer.retag(native), Retag::Push([0x81, 0, 0, 20]));
        assert_eq!(service.retag(native), Retag::Keep);
    }

    /// 802.1ad: a customer's tags stay in its frames, which a service tag carries.
    #[test]
    fn a_tunnel_carries_frames_whatever_their_tags() {
        let tunnel = PortVlans::tunnel(vlan(10));
        let uplink = trunk(Native::Dropped, TagType::Service);
        let in_it = tunnel.admit(None).unwrap();
        assert_eq!(uplink.retag(in_it), Retag::Push([0x88, 0xa8, 0, 10]));
        let back = uplink.admit(Some(10)).unwrap();
        assert_eq!(tunnel.retag(back), Retag::Pop);
    }

    #[test]
    fn frames_between_ports_that_say_nothing_are_left_alone() {
        let port = PortVlans::default();
        for tci in [None, Some(0), Some(0xe000), Some(1), Some(0x7ffe)] {
            let class = port.admit(tci).unwrap();
            assert_eq!(port.retag(class), Retag::Keep, "{tci:?}");
            assert!(port.contains(class.vlan));
        }
    }
}
