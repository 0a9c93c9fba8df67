//! How containerd is wired to this daemon: the plugin, who uses it, whether it is told which image a layer belongs to, and
//! whether both ask the same registries.
//!
//! Only what the file says is looked at. A running containerd has read it when it started.

use std::path::Path;

use super::containerd_config::{ContainerdConfig, Unreadable};
use super::{Finding, Level, shown};
use crate::Config;

const CHECK: &str = "containerd";
/// Where containerd listens when its configuration does not say.
const SOCKET: &str = "/run/containerd/containerd.sock";
const TRANSFER: [&str; 3] = ["plugins", "io.containerd.transfer.v1.local", "unpack_config"];

/// Where one schema of the configuration has what we look at.
struct Schema {
    /// The table with `snapshotter` and `disable_snapshot_annotations`.
    pulls: &'static [&'static str],
    /// The table of registries.
    registry: &'static [&'static str],
    /// The table of runtimes.
    runtimes: &'static [&'static str],
    /// Whether there is a transfer service that unpacks.
    transfer: bool,
}

const V2: Schema = Schema {
    pulls: &["plugins", "io.containerd.grpc.v1.cri", "containerd"],
    registry: &["plugins", "io.containerd.grpc.v1.cri", "registry"],
    runtimes: &["plugins", "io.containerd.grpc.v1.cri", "containerd", "runtimes"],
    transfer: false,
};

const V3: Schema = Schema {
    pulls: &["plugins", "io.containerd.cri.v1.images"],
    registry: &["plugins", "io.containerd.cri.v1.images", "registry"],
    runtimes: &["plugins", "io.containerd.cri.v1.runtime", "containerd", "runtimes"],
    transfer: true,
};

/// Looks at containerd's configuration at `path`; `socket` is where this daemon listens.
pub(super) fn look(path: &Path, socket: &Path, own: &Config) -> Vec<Finding> {
    let config = match ContainerdConfig::load(path) {
        Ok(config) => config,
        Err(Unreadable { place, why }) => {
            let what = format!("its configuration cannot be read: {why}");
            return vec![Finding::new(CHECK, Level::Error, what).at(place).change(plugin_lines(socket))];
        }
    };
    let mut wiring = Wiring { config: &config, socket, own, findings: Vec::new() };
    wiring.look();
    wiring.findings
}

fn plugin_lines(socket: &Path) -> String {
    format!("[proxy_plugins.soci]\n  type = \"snapshot\"\n  address = \"{}\"", shown(socket))
}

fn strip(address: &str) -> &str {
    address.strip_prefix("unix://").unwrap_or(address)
}

struct Wiring<'a> {
    config: &'a ContainerdConfig,
    socket: &'a Path,
    own: &'a Config,
    findings: Vec<Finding>,
}

impl Wiring<'_> {
    fn look(&mut self) {
        let version = self.config.get(&["version"]).and_then(toml::Value::as_integer);
        let schema = match version {
            Some(2) => V2,
            Some(3..) => V3,
            other => {
                let what = format!(
                    "its configuration is of version {}, whose tables have other names",
                    other.unwrap_or(1)
                );
                let finding = Finding::new(CHECK, Level::Error, what).at(self.config.place(&["version"]));
                self.findings
                    .push(finding.change("version = 2; `containerd config migrate` rewrites the rest"));
                return;
            }
        };
        self.server();
        if let Some(name) = self.plugin() {
            self.pulls(&schema, &name);
            if schema.transfer {
                self.transfer(&name);
            }
        }
        self.registries(&schema);
    }

    fn push(&mut self, level: Level, what: impl Into<String>) {
        self.findings.push(Finding::new(CHECK, level, what));
    }

    fn wrong(&mut self, level: Level, keys: &[&str], what: impl Into<String>, change: impl Into<String>) {
        let finding = Finding::new(CHECK, level, what).at(self.config.place(keys)).change(change);
        self.findings.push(finding);
    }

    /// Whether containerd is where we look for it.
    fn server(&mut self) {
        let keys = ["grpc", "address"];
        let theirs =
            strip(self.config.text(&keys).filter(|text| !text.is_empty()).unwrap_or(SOCKET)).to_owned();
        let ours = &self.own.containerd;
        if Path::new(&theirs) != ours {
            let what = format!("it listens on {theirs}, and this daemon looks for it on {}", shown(ours));
            let change = format!("in our configuration: [content_store]\ncontainerd_address = \"{theirs}\"");
            self.wrong(Level::Warning, &keys, what, change);
        }
        match std::os::unix::net::UnixStream::connect(&theirs) {
            Ok(_) => self.push(Level::Ok, format!("it answers on {theirs}")),
            Err(error) => self.findings.push(
                Finding::new(CHECK, Level::Warning, format!("it does not answer on {theirs}: {error}"))
                    .change("systemctl start containerd"),
            ),
        }
    }

    /// Returns the name under which containerd knows this daemon.
    fn plugin(&mut self) -> Option<String> {
        let socket = shown(self.socket);
        let address = |entry: &toml::Value| {
            entry.get("address").and_then(toml::Value::as_str).map(strip).map(str::to_owned)
        };
        let entries: Vec<(String, toml::Value)> = self
            .config
            .table(&["proxy_plugins"])
            .map(|(name, entry)| (name.clone(), entry.clone()))
            .collect();
        let found = entries.iter().find(|(_, entry)| address(entry).as_deref() == Some(&socket));
        let Some((name, entry)) = found else {
            let namesake = entries.iter().find(|(name, _)| name == "soci");
            match namesake.and_then(|(_, entry)| address(entry)) {
                Some(other) => {
                    let keys = ["proxy_plugins", "soci", "address"];
                    let what = format!("its plugin \"soci\" is at {other}; this daemon listens on {socket}");
                    self.wrong(Level::Error, &keys, what, format!("address = \"{socket}\""));
                }
                None => {
                    let what = "no proxy plugin is this daemon";
                    self.wrong(Level::Error, &["proxy_plugins"], what, plugin_lines(self.socket));
                }
            }
            return None;
        };
        if entry.get("type").and_then(toml::Value::as_str) != Some("snapshot") {
            let keys = ["proxy_plugins", name, "type"];
            self.wrong(
                Level::Error,
                &keys,
                format!("plugin {name:?} is no snapshotter"),
                "type = \"snapshot\"",
            );
            return None;
        }
        self.push(Level::Ok, format!("plugin {name:?} is this daemon"));
        Some(name.clone())
    }

    /// Whether the kubelet's pulls come to us, with the labels that they need.
    fn pulls(&mut self, schema: &Schema, name: &str) {
        let key = |last: &'static str| [schema.pulls, &[last]].concat();
        let snapshotter = key("snapshotter");
        let used = self.config.text(&snapshotter).unwrap_or("overlayfs").to_owned();
        let by_runtime = self
            .config
            .table(schema.runtimes)
            .any(|(_, runtime)| runtime.get("snapshotter").and_then(toml::Value::as_str) == Some(name));
        if used != name && !by_runtime {
            let what = format!("pulls of the kubelet and crictl use {used:?}");
            self.wrong(
                Level::Warning,
                &snapshotter,
                what,
                format!("{}\n  snapshotter = \"{name}\"", header(schema.pulls)),
            );
            return;
        }
        let who = if used == name { "pulls of the kubelet and crictl" } else { "some of its runtimes" };
        self.push(Level::Ok, format!("{who} use {name:?}"));
        let annotations = key("disable_snapshot_annotations");
        // Off is the only value that passes labels on; absent is on. Where the transfer service pulls, its export decides.
        if self.config.switch(&annotations) != Some(false) {
            let exported = schema.transfer && self.exports(name) && self.unpacks(name);
            let what = "it does not tell the snapshotter which image a layer belongs to, so no layer is lazy";
            let change = format!("{}\n  disable_snapshot_annotations = false", header(schema.pulls));
            if exported {
                let what = "before 2.1 it does not tell the snapshotter which image a layer belongs to";
                self.wrong(Level::Note, &annotations, what, change);
            } else {
                self.wrong(Level::Error, &annotations, what, change);
            }
        } else {
            self.push(Level::Ok, "it tells the snapshotter which image a layer belongs to");
        }
        let discard = key("discard_unpacked_layers");
        if self.config.switch(&discard) == Some(true) {
            let what = "layers that it unpacks itself are not kept, so `soci create` and `soci convert` cannot read them here";
            self.wrong(Level::Note, &discard, what, "discard_unpacked_layers = false");
        }
    }

    fn exports(&self, name: &str) -> bool {
        let keys = ["proxy_plugins", name, "exports", "enable_remote_snapshot_annotations"];
        self.config.text(&keys) == Some("true")
    }

    fn unpacks(&self, name: &str) -> bool {
        let entries = self.config.get(&TRANSFER).and_then(toml::Value::as_array);
        entries
            .into_iter()
            .flatten()
            .any(|entry| entry.get("snapshotter").and_then(toml::Value::as_str) == Some(name))
    }

    /// Whether `ctr images pull` and other clients of the transfer service can be lazy.
    fn transfer(&mut self, name: &str) {
        let export =
            format!("[proxy_plugins.{name}.exports]\n  enable_remote_snapshot_annotations = \"true\"");
        let platform = soci_oci::Platform::host();
        let entry = |snapshotter: &str| {
            format!(
                "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  platform = \"{platform}\"\n  snapshotter = \"{snapshotter}\""
            )
        };
        let unpack = format!("{}\n{}", entry(name), entry("overlayfs"));
        match (self.exports(name), self.unpacks(name)) {
            (true, true) => {
                self.push(Level::Ok, "pulls by the transfer service (ctr, nerdctl 2.x) may be lazy")
            }
            (false, false) => {
                let what = "pulls by the transfer service (`ctr images pull`) are not lazy";
                self.wrong(Level::Note, &TRANSFER, what, format!("{export}\n{unpack}"));
            }
            (true, false) => {
                let what = format!(
                    "the transfer service does not unpack for {name:?}, so `ctr images pull` fails with it"
                );
                self.wrong(Level::Warning, &TRANSFER, what, unpack);
            }
            (false, true) => {
                let what =
                    "the transfer service does not tell the snapshotter which image a layer belongs to";
                self.wrong(Level::Warning, &["proxy_plugins", name], what, export);
            }
        }
    }

    /// Whether containerd and we ask the same hosts for an image.
    fn registries(&mut self, schema: &Schema) {
        let key = |last: &'static str| [schema.registry, &[last]].concat();
        let directories = key("config_path");
        let theirs = self.config.text(&directories).unwrap_or_default().to_owned();
        let ours = self.own.hosts_dir.as_deref().map(shown).unwrap_or_default();
        if !theirs.is_empty() && !theirs.split(':').any(|theirs| Path::new(theirs) == Path::new(&ours)) {
            let what = format!("it reads registry hosts from {theirs:?}, and this daemon from {ours:?}");
            let first = theirs.split(':').next().unwrap_or_default();
            let change = format!("in our configuration: [resolver]\nconfig_path = \"{first}\"");
            self.wrong(Level::Warning, &directories, what, change);
        }
        for last in ["mirrors", "configs"] {
            let keys = key(last);
            if self.config.table(&keys).next().is_some() {
                let what = format!(
                    "its registry.{last} are not read by this daemon (nor by containerd 2.2 and later)"
                );
                let change = "move hosts into /etc/containerd/certs.d/HOST/hosts.toml, and logins into a Docker config";
                self.wrong(Level::Warning, &keys, what, change);
            }
        }
    }
}

/// Returns the line that opens a table.
fn header(keys: &[&str]) -> String {
    let bare = |key: &str| {
        key.chars().all(|character| character.is_ascii_alphanumeric() || "_-".contains(character))
    };
    let keys: Vec<String> =
        keys.iter().map(|key| if bare(key) { (*key).to_owned() } else { format!("\"{key}\"") }).collect();
    format!("[{}]", keys.join("."))
}

#[cfg(test)]
mod tests;
