//! What is configured of a port's VLANs, in the words of Open vSwitch's table `Port`.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use ringway_bridge::{Native, PortVlans, TagType, VlanId, VlanSet};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::value::{BadValue, number, shown};

/// A VLAN that a port may be in: 1 to 4094.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VlanTag(u16);

number!(VlanTag(u16) 1..=VlanId::MAX.get(), format: "uint16", what: "VLAN {}", hint: HINT);

/// IEEE 802.1Q-2022, table 9-2.
const HINT: &str = "VLANs are 1 to 4094: 0 is that of priority tags, and 4095 is reserved";

impl VlanTag {
    const fn is_one(number: u16) -> bool {
        1 <= number && number <= VlanId::MAX.get()
    }

    /// As the bridge has it.
    pub fn id(self) -> VlanId {
        VlanId::new(self.0).unwrap_or(VlanId::NONE)
    }
}

/// VLANs as they are written: `10,20-30`, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VlanNumbers(Box<VlanSet>);

impl VlanNumbers {
    /// The VLANs.
    pub fn set(&self) -> &VlanSet {
        &self.0
    }
}

impl FromStr for VlanNumbers {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let mut set = VlanSet::EMPTY;
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| match text.parse::<u16>() {
                Ok(number) => VlanTag::try_from(number),
                Err(_) => Err(BadValue::new(
                    format!("{} lists no VLANs", shown(part)),
                    "write numbers and ranges with commas between them, as 10,20-30",
                )),
            };
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(BadValue::new(
                    format!("the range {part} ends before it begins"),
                    format!("write {last}-{first}"),
                ));
            }
            for vlan in (first.0..=last.0).filter_map(VlanId::new) {
                if !set.insert(vlan) {
                    return Err(BadValue::new(
                        format!("VLAN {vlan} is listed twice"),
                        "list each VLAN once, alone or in one range",
                    ));
                }
            }
        }
        Ok(Self(Box::new(set)))
    }
}

impl fmt::Display for VlanNumbers {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

impl Serialize for VlanNumbers {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for VlanNumbers {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(from)?;
        text.parse().map_err(BadValue::into_serde)
    }
}

impl JsonSchema for VlanNumbers {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "VlanNumbers".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$" })
    }
}

/// How a port tells its VLANs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum VlanMode {
    /// All frames are in VLAN `tag`, and have no tag outside
    Access,
    /// Frames have the tags of their VLANs; those without are dropped if there are `trunks`
    Trunk,
    /// A trunk whose untagged frames are in VLAN `tag`, which leaves it tagged
    NativeTagged,
    /// A trunk whose untagged frames are in VLAN `tag`, which leaves it untagged
    NativeUntagged,
    /// All frames, tagged or not, are in service VLAN `tag` as they are
    Dot1qTunnel,
}

impl VlanMode {
    /// The mode as it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Access => "access",
            Self::Trunk => "trunk",
            Self::NativeTagged => "native-tagged",
            Self::NativeUntagged => "native-untagged",
            Self::Dot1qTunnel => "dot1q-tunnel",
        }
    }
}

/// Which tags a trunk has; those of the other type are payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum VlanEthertype {
    /// 0x8100: customer tags
    #[default]
    #[serde(rename = "802.1q")]
    #[cfg_attr(feature = "clap", value(name = "802.1q"))]
    Customer,
    /// 0x88a8: service tags, which carry others
    #[serde(rename = "802.1ad")]
    #[cfg_attr(feature = "clap", value(name = "802.1ad"))]
    Service,
}

impl VlanEthertype {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Customer => "802.1q",
            Self::Service => "802.1ad",
        }
    }

    const fn is_default(&self) -> bool {
        matches!(self, Self::Customer)
    }
}

/// Which VLANs a port is in. Nothing said: in all, as a trunk; its untagged frames are in none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct VlanConfig {
    /// `access` if nothing but a tag is said, `trunk` without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mode: Option<VlanMode>,
    /// The VLAN of an access port, a trunk's native VLAN, or the service VLAN of a tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tag: Option<VlanTag>,
    /// The VLANs of a trunk, as `10,20-30`; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trunks: Option<VlanNumbers>,
    /// Which tags a trunk has.
    #[serde(default, skip_serializing_if = "VlanEthertype::is_default")]
    ethertype: VlanEthertype,
}

impl<'de> Deserialize<'de> for VlanConfig {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            mode: Option<VlanMode>,
            tag: Option<VlanTag>,
            trunks: Option<VlanNumbers>,
            #[serde(default)]
            ethertype: VlanEthertype,
        }
        let Fields {
            mode,
            tag,
            trunks,
            ethertype,
        } = Fields::deserialize(from)?;
        Self::new(mode, tag, trunks, ethertype).map_err(|bad| de::Error::custom(bad.into_text()))
    }
}

impl VlanConfig {
    /// What is said of a port's VLANs.
    ///
    /// # Errors
    /// It contradicts itself.
    pub fn new(
        mode: Option<VlanMode>,
        tag: Option<VlanTag>,
        trunks: Option<VlanNumbers>,
        ethertype: VlanEthertype,
    ) -> Result<Self, BadValue> {
        let mut config = Self {
            mode,
            tag,
            trunks,
            ethertype,
        };
        config.check()?;
        // A trunk of all says nothing.
        config.mode = mode.filter(|mode| *mode != VlanMode::Trunk);
        Ok(config)
    }

    fn check(&self) -> Result<(), BadValue> {
        let mode = self.mode();
        let refuse = |reason: String, hint: String| Err(BadValue::new(reason, hint));
        let told = mode.as_str();
        match (mode, self.tag, &self.trunks) {
            (VlanMode::Access, Some(_), Some(_)) if self.mode.is_none() => refuse(
                "a tag alone is an access port's, and trunks are a trunk's".into(),
                "leave one out, or make the tag the trunk's native VLAN by the mode \
                 native-untagged or native-tagged"
                    .into(),
            ),
            (VlanMode::Access | VlanMode::Dot1qTunnel, _, Some(_)) => refuse(
                format!("a port of mode {told} has no trunks"),
                "leave them out: it is in the VLAN of its tag alone".into(),
            ),
            (VlanMode::Trunk, Some(tag), _) => refuse(
                "a port of mode trunk has no tag".into(),
                format!("leave it out, or make {tag} its native VLAN by the mode native-untagged"),
            ),
            (VlanMode::Trunk, None, _) => Ok(()),
            (_, None, _) => refuse(
                format!("a port of mode {told} needs a tag"),
                "give the VLAN of its untagged frames as tag".into(),
            ),
            (_, Some(tag), Some(trunks)) if !trunks.set().contains(tag.id()) => refuse(
                format!("the native VLAN {tag} is not among the trunks {trunks}"),
                format!("add it: {tag},{trunks}"),
            ),
            _ => Ok(()),
        }?;
        let is_trunk = !matches!(mode, VlanMode::Access | VlanMode::Dot1qTunnel);
        if is_trunk || self.ethertype.is_default() {
            return Ok(());
        }
        refuse(
            format!("a port of mode {told} has no tags whose EtherType could be told"),
            "leave the ethertype out; the trunk that carries the VLAN says which it has".into(),
        )
    }

    /// Whether nothing is said.
    pub fn is_default(&self) -> bool {
        self == &Self::default()
    }

    /// How the port tells its VLANs.
    pub fn mode(&self) -> VlanMode {
        let access = self.tag.map(|_| VlanMode::Access);
        self.mode.or(access).unwrap_or(VlanMode::Trunk)
    }

    /// The VLAN of its untagged frames, if one is said.
    pub fn tag(&self) -> Option<VlanTag> {
        self.tag
    }

    /// What it is for the bridge.
    pub fn vlans(&self) -> PortVlans {
        let tag_type = match self.ethertype {
            VlanEthertype::Customer => TagType::Customer,
            VlanEthertype::Service => TagType::Service,
        };
        let tag = self.tag.map_or(VlanId::NONE, VlanTag::id);
        let trunks = self.trunks.as_ref().map(|list| list.set().clone());
        let (members, native) = match self.mode() {
            VlanMode::Access => return PortVlans::access(tag),
            VlanMode::Dot1qTunnel => return PortVlans::tunnel(tag),
            VlanMode::NativeTagged => (trunks, Native::Tagged(tag)),
            VlanMode::NativeUntagged => (trunks, Native::Untagged(tag)),
            VlanMode::Trunk if trunks.is_some() => (trunks, Native::Dropped),
            VlanMode::Trunk => (trunks, Native::Untagged(VlanId::NONE)),
        };
        PortVlans::trunk(members.unwrap_or_else(VlanSet::all), native, tag_type)
    }
}

/// As `access 10`, `native-untagged 10 of 10,20-30`, `trunk of all`.
impl fmt::Display for VlanConfig {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = self.mode();
        write!(out, "{}", mode.as_str())?;
        if let Some(tag) = self.tag {
            write!(out, " {tag}")?;
        }
        match &self.trunks {
            Some(trunks) => write!(out, " of {trunks}")?,
            None if matches!(mode, VlanMode::Access | VlanMode::Dot1qTunnel) => {}
            None => write!(out, " of all")?,
        }
        if !self.ethertype.is_default() {
            write!(out, ", {}", self.ethertype.as_str())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json, to_value};

    use super::*;

    fn read(fields: &Value) -> Result<VlanConfig, String> {
        from_value(fields.clone()).map_err(|error| error.to_string())
    }

    #[test]
    fn settings_survive_the_way_and_back() {
        for (fields, told) in [
            (json!({}), "trunk of all"),
            (json!({ "tag": 10 }), "access 10"),
            (json!({ "mode": "access", "tag": 4094 }), "access 4094"),
            (json!({ "trunks": "1-4094" }), "trunk of 1-4094"),
            (json!({ "trunks": "10,20-30" }), "trunk of 10,20-30"),
            (
                json!({ "mode": "native-untagged", "tag": 10, "trunks": "10,20" }),
                "native-untagged 10 of 10,20",
            ),
            (
                json!({ "mode": "native-tagged", "tag": 10 }),
                "native-tagged 10 of all",
            ),
            (
                json!({ "mode": "dot1q-tunnel", "tag": 100 }),
                "dot1q-tunnel 100",
            ),
            (
                json!({ "trunks": "100", "ethertype": "802.1ad" }),
                "trunk of 100, 802.1ad",
            ),
        ] {
            let config = read(&fields).unwrap();
            assert_eq!(to_value(&config).unwrap(), fields);
            assert_eq!(config.to_string(), told);
        }
        assert_eq!(VlanConfig::default().vlans(), PortVlans::default());
        let trunk = read(&json!({ "mode": "trunk" })).unwrap();
        assert!(trunk.is_default());
    }

    #[test]
    fn what_contradicts_itself_is_refused_with_a_remedy() {
        for (fields, expected, remedy) in [
            (json!({ "tag": 0 }), "VLAN 0", "1 to 4094"),
            (json!({ "tag": 4095 }), "VLAN 4095", "1 to 4094"),
            (json!({ "trunks": "0-5" }), "VLAN 0", "1 to 4094"),
            (json!({ "trunks": "10,4095" }), "VLAN 4095", "1 to 4094"),
            (json!({ "trunks": "" }), "lists no VLANs", "as 10,20-30"),
            (json!({ "trunks": "10,,20" }), "lists no VLANs", "10,20-30"),
            (
                json!({ "trunks": "10, 20" }),
                "\" 20\" lists no",
                "10,20-30",
            ),
            (
                json!({ "trunks": "30-20" }),
                "ends before it begins",
                "20-30",
            ),
            (
                json!({ "trunks": "10-20,15" }),
                "VLAN 15 is listed twice",
                "once",
            ),
            (
                json!({ "trunks": "10-20,5-12" }),
                "VLAN 10 is listed twice",
                "once",
            ),
            (
                json!({ "tag": 10, "trunks": "10" }),
                "a tag alone",
                "native-untagged",
            ),
            (
                json!({ "mode": "trunk", "tag": 10 }),
                "has no tag",
                "native-untagged",
            ),
            (json!({ "mode": "access" }), "needs a tag", "as tag"),
            (json!({ "mode": "dot1q-tunnel" }), "needs a tag", "as tag"),
            (json!({ "mode": "native-tagged" }), "needs a tag", "as tag"),
            (
                json!({ "mode": "dot1q-tunnel", "tag": 1, "trunks": "1" }),
                "no trunks",
                "leave",
            ),
            (
                json!({ "mode": "native-untagged", "tag": 10, "trunks": "20-30" }),
                "native VLAN 10 is not among the trunks 20-30",
                "10,20-30",
            ),
            (
                json!({ "tag": 10, "ethertype": "802.1ad" }),
                "no tags",
                "leave the ethertype out",
            ),
        ] {
            let error = read(&fields).expect_err(expected);
            let bad = BadValue::from_serde(&error).unwrap();
            assert!(bad.reason.contains(expected), "{fields}: {error}");
            assert!(bad.hint.contains(remedy), "{fields}: {error}");
        }
        assert!(read(&json!({ "mode": "hybrid", "tag": 1 })).is_err());
        assert!(read(&json!({ "vlan": 1 })).is_err());
    }
}
