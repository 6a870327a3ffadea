//! Reloading: which part of a new file a running node takes over, and what else differs.
//!
//! Before it: [`crate::reload`] has read a file that is valid.
//! After it: the cores get [`Reloaded::config`]; the operator gets the two lists.
//! Thread: the uplink's runtime. Allocates: freely.
//! Invariant: every key is either taken over or named as one that needs a restart. All structs are taken apart field by
//! field, so a new key does not compile before this file says which; `docs/CONFIG.md` lists both, and a test holds it to
//! this.
//! Not here: the swap itself ([`crate::live`]).
//!
//! What is taken over is what no memory, file or socket was made for at start. Whatever the checks of one file hold
//! together (`upload` with `limits.record`, `spool.size` with `cores`) stays together, as all of it needs a restart; so
//! the mixture of two valid files is valid too.

use std::collections::BTreeSet;

use super::{
    Ack, Admin, Batch, Compression, Config, Credential, DeadLetter, Deadlines, Destination, Http2,
    KustoConfig, Limits, Listener, Memory, Principal, Response, Route, Slabs, Spool, Table, Uplink,
    Upload,
};

/// A running configuration after a new file was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reloaded {
    /// What the node goes on with.
    pub config: Config,
    /// Keys that differ from before; also `listener[ADDRESS]`, `principal[NAME]` and `route[PATH]`, where one is new or
    /// gone.
    pub changed: BTreeSet<String>,
    /// Keys of the file that differ from what the node goes on with.
    pub needs_restart: BTreeSet<String>,
}

impl Reloaded {
    /// Takes over from `file` what can be.
    pub fn new(running: &Config, file: &Config) -> Self {
        let config = Config {
            cores: running.cores,
            listeners: running_listeners(running, file),
            admin: running.admin.clone(),
            destination: running.destination.clone(),
            spool: running.spool.clone(),
            uplink: running.uplink.clone(),
            dead_letter: running.dead_letter.clone(),
            batch: file.batch.clone(),
            compression: running.compression.clone(),
            response: file.response.clone(),
            slabs: running.slabs.clone(),
            upload: running.upload.clone(),
            limits: Limits {
                wait: file.limits.wait,
                // Its table of connections is made at start.
                connections: running.limits.connections,
                connections_per_address: file.limits.connections_per_address,
                requests_per_connection: file.limits.requests_per_connection,
                // Upload buffers are made for it.
                record: running.limits.record,
                ack: file.limits.ack,
                drain: file.limits.drain,
            },
            deadlines: file.deadlines.clone(),
            http2: running.http2.clone(),
            memory: running.memory.clone(),
            principals: file.principals.clone(),
            routes: running_routes(running, file),
            tables: running.tables.clone(),
        };
        Self {
            changed: differences(running, &config),
            needs_restart: differences(&config, file),
            config,
        }
    }
}

/// The sockets that there are, with the rules of the file.
fn running_listeners(running: &Config, file: &Config) -> Vec<Listener> {
    let named = listeners_by_name(file);
    listeners_by_name(running)
        .into_iter()
        .map(|(name, listener)| {
            let found = named.iter().find(|(other, _)| *other == name);
            match found {
                Some((_, of_file)) => Listener {
                    address: listener.address,
                    principals: of_file.principals.clone(),
                    allow: of_file.allow.clone(),
                    proxies: of_file.proxies.clone(),
                    // Which files it takes; what is in them is taken over at any time ([`crate::tls::Tls`]).
                    tls: listener.tls.clone(),
                    // The windows of its connections are in the plan, or not.
                    http2: listener.http2,
                },
                // It listens until the restart, to those of its principals that there still are.
                None => Listener {
                    principals: listener.principals.as_ref().map(|indexes| {
                        let names = principal_names(running, indexes);
                        (0..file.principals.len())
                            .filter(|index| names.contains(file.principals[*index].name.as_str()))
                            .collect()
                    }),
                    ..listener.clone()
                },
            }
        })
        .collect()
}

/// The routes of the file, as far as there are upload buffers for their tables.
fn running_routes(running: &Config, file: &Config) -> Vec<Route> {
    let routes = file.routes.iter().filter_map(|route| {
        let Route {
            pattern,
            table_index,
            envelope,
            ack,
            default_tag,
            principals,
            allow,
            rate,
        } = route.clone();
        let table = &file.tables[table_index];
        let (table_index, envelope, ack, default_tag) = match running_table(running, table, ack) {
            Some(table_index) => (table_index, envelope, ack, default_tag),
            None => {
                // What is stored, and how, belongs together: it stays as it was. A new route waits for the restart.
                let before = running
                    .routes
                    .iter()
                    .find(|before| before.pattern == pattern)?;
                let default_tag = before.default_tag.clone();
                (before.table_index, before.envelope, before.ack, default_tag)
            }
        };
        Some(Route {
            pattern,
            table_index,
            envelope,
            ack,
            default_tag,
            principals,
            allow,
            rate,
        })
    });
    routes.collect()
}

/// The running table that rows for `table` can go to under this promise.
fn running_table(running: &Config, table: &Table, ack: Ack) -> Option<usize> {
    running.tables.iter().position(|known| {
        let delivered = known.delivered;
        // Deliveries are reported only for tables that somebody waited for at start.
        let is_reported = delivered || ack != Ack::Delivered;
        is_reported
            && *known
                == Table {
                    delivered,
                    ..table.clone()
                }
    })
}

/// Notes the fields of two structs of one type that differ; all fields have to be named.
macro_rules! compare {
    ($differing:ident, $table:literal, $a:expr, $b:expr, $type:ident { $($field:ident),* }) => {{
        let $type { $($field),* } = $a;
        $(
            if *$field != $b.$field {
                $differing.insert(concat!($table, ".", stringify!($field)).to_owned());
            }
        )*
    }};
}

/// The keys in which two configurations differ.
fn differences(a: &Config, b: &Config) -> BTreeSet<String> {
    let mut differing = BTreeSet::new();
    let Config {
        cores,
        listeners: _,
        admin,
        destination,
        spool,
        uplink,
        dead_letter,
        batch,
        compression,
        response,
        slabs,
        upload,
        limits,
        deadlines,
        http2,
        memory,
        principals: _,
        routes: _,
        // They follow from the routes.
        tables: _,
    } = a;
    if *cores != b.cores {
        differing.insert("cores".to_owned());
    }
    compare!(differing, "admin", admin, b.admin, Admin { address });
    destinations(&mut differing, destination, &b.destination);
    compare!(
        differing,
        "spool",
        spool,
        b.spool,
        Spool { directory, size }
    );
    compare!(
        differing,
        "uplink",
        uplink,
        b.uplink,
        Uplink { concurrency }
    );
    compare!(
        differing,
        "dead_letter",
        dead_letter,
        b.dead_letter,
        DeadLetter {
            directory,
            size,
            age
        }
    );
    compare!(differing, "batch", batch, b.batch, Batch { max_age });
    compare!(
        differing,
        "compression",
        compression,
        b.compression,
        Compression { level }
    );
    compare!(
        differing,
        "response",
        response,
        b.response,
        Response { status }
    );
    compare!(
        differing,
        "slabs",
        slabs,
        b.slabs,
        Slabs {
            registered,
            classes
        }
    );
    compare!(
        differing,
        "upload",
        upload,
        b.upload,
        Upload {
            buffer_count,
            buffer_size
        }
    );
    compare!(
        differing,
        "limits",
        limits,
        b.limits,
        Limits {
            wait,
            connections,
            connections_per_address,
            requests_per_connection,
            record,
            ack,
            drain
        }
    );
    compare!(
        differing,
        "deadlines",
        deadlines,
        b.deadlines,
        Deadlines {
            handshake,
            head,
            body_start,
            body,
            body_rate,
            body_rate_window,
            contended,
            write,
            idle
        }
    );
    compare!(
        differing,
        "http2",
        http2,
        b.http2,
        Http2 {
            connections,
            streams,
            window
        }
    );
    compare!(differing, "memory", memory, b.memory, Memory { limit });
    listeners(&mut differing, a, b);
    principals(&mut differing, a, b);
    routes(&mut differing, a, b);
    differing
}

fn destinations(differing: &mut BTreeSet<String>, a: &Destination, b: &Destination) {
    match (a, b) {
        (Destination::Null, Destination::Null) => {}
        (Destination::Directory { path: a }, Destination::Directory { path: b }) => {
            if a != b {
                differing.insert("destination.path".to_owned());
            }
        }
        (Destination::Kusto(a), Destination::Kusto(b)) => compare!(
            differing,
            "destination",
            a,
            b,
            KustoConfig {
                ingest_uri,
                identity,
                mode,
                trusted_hosts
            }
        ),
        (Destination::Null | Destination::Directory { .. } | Destination::Kusto(_), _) => {
            differing.insert("destination.type".to_owned());
        }
    }
}

/// The pairs of the same name, and the names of which there is only one.
fn paired<T>(
    differing: &mut BTreeSet<String>,
    a: Vec<(String, T)>,
    mut b: Vec<(String, T)>,
) -> Vec<(String, T, T)> {
    let mut pairs = Vec::new();
    for (name, of_a) in a {
        match b.iter().position(|(other, _)| *other == name) {
            Some(index) => pairs.push((name, of_a, b.swap_remove(index).1)),
            None => {
                differing.insert(name);
            }
        }
    }
    differing.extend(b.into_iter().map(|(name, _)| name));
    pairs
}

fn listeners(differing: &mut BTreeSet<String>, a: &Config, b: &Config) {
    for (name, of_a, of_b) in paired(differing, listeners_by_name(a), listeners_by_name(b)) {
        let Listener {
            // Of its name.
            address: _,
            principals,
            allow,
            proxies,
            tls,
            http2,
        } = of_a;
        let mut note = |key: &str, is_different: bool| {
            if is_different {
                differing.insert(format!("{name}.{key}"));
            }
        };
        let allowed = allowed(a, principals) != allowed(b, &of_b.principals);
        note("principals", allowed);
        note("allow", *allow != of_b.allow);
        note("proxies", *proxies != of_b.proxies);
        note("tls", *tls != of_b.tls);
        note("http2", *http2 != of_b.http2);
    }
}

fn principals(differing: &mut BTreeSet<String>, a: &Config, b: &Config) {
    let named = |config: &'_ Config| -> Vec<(String, Principal)> {
        let principals = config.principals.iter();
        principals
            .map(|principal| (principal_key(&principal.name), principal.clone()))
            .collect()
    };
    for (name, of_a, of_b) in paired(differing, named(a), named(b)) {
        let Principal {
            name: _,
            credential,
            rate,
        } = of_a;
        if credential != of_b.credential {
            differing.insert(format!("{name}.{}", credential_key(&of_b.credential)));
        }
        if rate != of_b.rate {
            differing.insert(format!("{name}.rate"));
        }
    }
}

fn routes(differing: &mut BTreeSet<String>, a: &Config, b: &Config) {
    let named = |config: &'_ Config| -> Vec<(String, Route)> {
        let routes = config.routes.iter();
        routes
            .map(|route| (format!("route[{}]", route.pattern), route.clone()))
            .collect()
    };
    for (name, of_a, of_b) in paired(differing, named(a), named(b)) {
        let Route {
            pattern: _,
            table_index,
            envelope,
            ack,
            default_tag,
            principals,
            allow,
            rate,
        } = of_a;
        let Table {
            database,
            table,
            mapping,
            dedup,
            // They follow from `ack`.
            spooled: _,
            delivered: _,
        } = &a.tables[table_index];
        let table_of_b = &b.tables[of_b.table_index];
        let mut note = |key: &str, is_different: bool| {
            if is_different {
                differing.insert(format!("{name}.{key}"));
            }
        };
        note("database", *database != table_of_b.database);
        note("table", *table != table_of_b.table);
        note("mapping", *mapping != table_of_b.mapping);
        note("dedup", *dedup != table_of_b.dedup);
        note("envelope", envelope != of_b.envelope);
        note("ack", ack != of_b.ack);
        note("default_tag", default_tag != of_b.default_tag);
        let allowed = allowed(a, &principals) != allowed(b, &of_b.principals);
        note("principals", allowed);
        note("allow", allow != of_b.allow);
        note("rate", rate != of_b.rate);
    }
}

/// The listeners with their names. Port 0 can be there several times: the second is the second.
fn listeners_by_name(config: &Config) -> Vec<(String, &Listener)> {
    let mut named: Vec<(String, &Listener)> = Vec::new();
    for listener in &config.listeners {
        let address = listener.address;
        let before = named.iter().filter(|(_, known)| known.address == address);
        let name = match before.count() {
            0 => format!("listener[{address}]"),
            before => format!("listener[{address} #{}]", before + 1),
        };
        named.push((name, listener));
    }
    named
}

/// What a principal is called in the lists.
pub fn principal_key(name: &str) -> String {
    format!("principal[{name}]")
}

/// The key that a credential is under.
pub fn credential_key(credential: &Credential) -> &'static str {
    match credential {
        Credential::Bearer(_) => "bearer",
        Credential::Basic { .. } => "basic",
        Credential::Hmac(_) => "hmac",
        Credential::Certificate(_) => "certificate",
    }
}

/// Who may send, by name: indexes are of one configuration.
fn allowed<'a>(config: &'a Config, indexes: &Option<Vec<usize>>) -> Option<BTreeSet<&'a str>> {
    let indexes = indexes.as_ref()?;
    Some(principal_names(config, indexes))
}

fn principal_names<'a>(config: &'a Config, indexes: &[usize]) -> BTreeSet<&'a str> {
    let names = indexes.iter().map(|index| &*config.principals[*index].name);
    names.collect()
}

#[cfg(test)]
mod tests;
