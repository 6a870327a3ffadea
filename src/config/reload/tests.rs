use super::*;
use crate::config::tests::{DOCUMENT, code_keys, parse};

/// What a reload does with a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Applies,
    Restarts,
}
use What::{Applies, Restarts};

const PRINCIPALS: &str = "[[principal]]\nname = \"a\"\nbearer = [{ env = \"A\" }]\n\
                          [[principal]]\nname = \"b\"\nbearer = [{ env = \"B\" }]\n";
const TWO_TABLES: &str = "[[route]]\npath = \"/known\"\ndatabase = \"D\"\ntable = \"T\"\nmapping = \"m\"\ndedup = \"ingest-by\"\n\
                          [[route]]\npath = \"/memory\"\nack = \"memory\"\n\
                          [[route]]\npath = \"/delivered\"\ntable = \"Delivered\"\nack = \"delivered\"\n";

/// For each key a value before and another one after, which file they stand in, what they are reported under, and what
/// a reload does.
fn samples() -> Vec<(&'static str, String, String, &'static str, What)> {
    let mut samples = Vec::new();
    let mut add = |key: &'static str, text: &str, values: [&str; 2], reported, what| {
        let [before, after] = values.map(|value| text.replace('@', value));
        samples.push((key, before, after, reported, what));
    };
    let mut plain = |key: &'static str, values: [&str; 2], what| {
        let text = match key.rsplit_once('.') {
            Some((table, name)) => format!("[{table}]\n{name} = @"),
            None => format!("{key} = @"),
        };
        add(key, &text, values, key, what);
    };
    // The second value of `cores` depends on the machine: see the test.
    plain("cores", ["1", "1"], Restarts);
    plain(
        "admin.address",
        ["\"127.0.0.1:1\"", "\"127.0.0.1:2\""],
        Restarts,
    );
    plain("destination.type", ["\"directory\"", "\"null\""], Restarts);
    plain("destination.path", ["\"a\"", "\"b\""], Restarts);
    plain("spool.directory", ["\"a\"", "\"b\""], Restarts);
    plain("spool.size", ["\"1GiB\"", "\"2GiB\""], Restarts);
    plain("uplink.concurrency", ["1", "2"], Restarts);
    plain("dead_letter.directory", ["\"a\"", "\"b\""], Restarts);
    plain("dead_letter.size", ["\"1GiB\"", "\"2GiB\""], Restarts);
    plain("dead_letter.age", ["\"1day\"", "\"2days\""], Restarts);
    plain("batch.max_age", ["\"1s\"", "\"2s\""], Applies);
    plain("compression.level", ["1", "2"], Restarts);
    plain("response.status", ["200", "204"], Applies);
    plain("slabs.registered", ["\"prefer\"", "\"never\""], Restarts);
    plain("upload.buffer_count", ["3", "4"], Restarts);
    plain("upload.buffer_size", ["\"4MiB\"", "\"8MiB\""], Restarts);
    plain("limits.connections", ["1", "2"], Restarts);
    plain("limits.connections_per_address", ["1", "2"], Applies);
    plain("limits.requests_per_connection", ["1", "2"], Applies);
    plain("limits.record", ["\"1MiB\"", "\"1KiB\""], Restarts);
    plain("http2.connections", ["1", "2"], Restarts);
    plain("http2.streams", ["1", "2"], Restarts);
    plain("http2.window", ["\"32KiB\"", "\"64KiB\""], Restarts);
    plain("memory.limit", ["\"1GiB\"", "\"2GiB\""], Restarts);
    plain("deadlines.body_rate", ["\"1KiB\"", "\"2KiB\""], Applies);
    for key in [
        "limits.wait",
        "limits.ack",
        "limits.drain",
        "deadlines.handshake",
        "deadlines.head",
        "deadlines.body_start",
        "deadlines.body",
        "deadlines.body_rate_window",
        "deadlines.contended",
        "deadlines.write",
        "deadlines.idle",
    ] {
        plain(key, ["\"1s\"", "\"2s\""], Applies);
    }
    for (key, text, values) in [
        (
            "slabs.classes.size",
            "size = \"@\", count = 1",
            ["16KiB", "32KiB"],
        ),
        (
            "slabs.classes.count",
            "size = \"16KiB\", count = @",
            ["1", "2"],
        ),
    ] {
        let text = format!("slabs.classes = [{{ {text} }}]");
        add(key, &text, values, "slabs.classes", Restarts);
    }
    // --- Kusto
    let kusto = |rest: &str| format!("[destination]\ntype = \"kusto\"\n{rest}\n");
    let uri = "ingest_uri = \"https://ingest-a.kusto.windows.net\"\n";
    let system = "identity = { managed_identity = \"system\" }\n";
    add(
        "destination.ingest_uri",
        &kusto(&format!(
            "ingest_uri = \"https://ingest-@.kusto.windows.net\"\n{system}"
        )),
        ["a", "b"],
        "destination.ingest_uri",
        Restarts,
    );
    add(
        "destination.trusted_hosts",
        &kusto(&format!("{uri}{system}trusted_hosts = [@]")),
        ["", "\"a.example.com\""],
        "destination.trusted_hosts",
        Restarts,
    );
    let secret = "tenant = \"t\", client_id = \"c\"";
    for (key, identity, values) in [
        (
            "destination.identity.managed_identity",
            "managed_identity = @",
            [
                "\"system\"",
                "{ client_id = \"11111111-2222-3333-4444-555555555555\" }",
            ],
        ),
        (
            "destination.identity.azure_cli",
            "@ = {}",
            ["azure_cli", "workload_identity"],
        ),
        (
            "destination.identity.workload_identity.tenant",
            "workload_identity = { tenant = \"@\" }",
            ["t", "u"],
        ),
        (
            "destination.identity.workload_identity.client_id",
            "workload_identity = { client_id = \"@\" }",
            ["t", "u"],
        ),
        (
            "destination.identity.workload_identity.token_file",
            "workload_identity = { token_file = \"@\" }",
            ["t", "u"],
        ),
        (
            "destination.identity.client_secret.tenant",
            "client_secret = { tenant = \"@\", client_id = \"c\", secret = { env = \"S\" } }",
            ["t", "u"],
        ),
        (
            "destination.identity.client_secret.client_id",
            "client_secret = { tenant = \"t\", client_id = \"@\", secret = { env = \"S\" } }",
            ["c", "d"],
        ),
        (
            "destination.identity.client_secret.secret",
            &format!("client_secret = {{ {secret}, secret = {{ env = \"@\" }} }}"),
            ["S", "R"],
        ),
        (
            "destination.identity.client_certificate.tenant",
            "client_certificate = { tenant = \"@\", client_id = \"c\", certificate = { env = \"S\" } }",
            ["t", "u"],
        ),
        (
            "destination.identity.client_certificate.client_id",
            "client_certificate = { tenant = \"t\", client_id = \"@\", certificate = { env = \"S\" } }",
            ["c", "d"],
        ),
        (
            "destination.identity.client_certificate.certificate",
            &format!("client_certificate = {{ {secret}, certificate = {{ env = \"@\" }} }}"),
            ["S", "R"],
        ),
    ] {
        let text = kusto(&format!("{uri}identity = {{ {identity} }}"));
        add(key, &text, values, "destination.identity", Restarts);
    }
    // --- listeners
    add(
        "listener.address",
        "[[listener]]\naddress = \"127.0.0.1:1\"\n@",
        ["", "[[listener]]\naddress = \"127.0.0.1:2\"\n"],
        "listener[127.0.0.1:2]",
        Restarts,
    );
    for (key, text, values) in [
        ("principals", "principals = [@]", ["\"a\"", "\"b\""]),
        ("allow", "allow = [\"@\"]", ["::1", "127.0.0.1"]),
        ("proxies", "proxies = [\"@\"]", ["::1", "127.0.0.1"]),
    ] {
        let text = format!("{PRINCIPALS}[[listener]]\naddress = \"127.0.0.1:1\"\n{text}");
        let (key, reported) = match key {
            "principals" => ("listener.principals", "listener[127.0.0.1:1].principals"),
            "allow" => ("listener.allow", "listener[127.0.0.1:1].allow"),
            _ => ("listener.proxies", "listener[127.0.0.1:1].proxies"),
        };
        add(key, &text, values, reported, Applies);
    }
    add(
        "listener.http2",
        "[[listener]]\naddress = \"127.0.0.1:1\"\nhttp2 = @",
        ["false", "true"],
        "listener[127.0.0.1:1].http2",
        Restarts,
    );
    for (key, values) in [
        (
            "listener.tls.certificate",
            ["certificate = \"a\"", "certificate = \"b\""],
        ),
        ("listener.tls.key", ["key = \"a\"", "key = \"b\""]),
        (
            "listener.tls.client_ca",
            ["client_ca = \"a\"", "client_ca = \"b\""],
        ),
        (
            "listener.tls.client_crl",
            ["client_crl = \"a\"", "client_crl = \"b\""],
        ),
        (
            "listener.tls.client_auth",
            ["client_auth = \"required\"", "client_auth = \"optional\""],
        ),
    ] {
        let mut keys = vec!["certificate = \"c\"", "key = \"k\"", "client_ca = \"ca\""];
        let name = values[0].split(' ').next().unwrap();
        keys.retain(|other| other.split(' ').next() != Some(name));
        keys.push("@");
        let text = format!(
            "[[listener]]\naddress = \"127.0.0.1:1\"\ntls = {{ {} }}",
            keys.join(", ")
        );
        add(key, &text, values, "listener[127.0.0.1:1].tls", Restarts);
    }
    // --- principals
    add(
        "principal.name",
        "[[principal]]\nname = \"a\"\nbearer = [{ env = \"A\" }]\n@",
        [
            "",
            "[[principal]]\nname = \"b\"\nbearer = [{ env = \"B\" }]\n",
        ],
        "principal[b]",
        Applies,
    );
    for (key, text, values, reported) in [
        (
            "principal.bearer",
            "bearer = [{ env = \"@\" }]",
            ["A", "B"],
            "principal[p].bearer",
        ),
        (
            "principal.basic.user",
            "basic = { user = \"@\", passwords = [{ env = \"A\" }] }",
            ["a", "b"],
            "principal[p].basic",
        ),
        (
            "principal.basic.passwords",
            "basic = { user = \"a\", passwords = [{ env = \"@\" }] }",
            ["A", "B"],
            "principal[p].basic",
        ),
        (
            "principal.hmac.secrets",
            "hmac = { secrets = [{ env = \"@\" }] }",
            ["A", "B"],
            "principal[p].hmac",
        ),
        (
            "principal.hmac.header",
            "hmac = { secrets = [{ env = \"A\" }], header = \"@\" }",
            ["A", "B"],
            "principal[p].hmac",
        ),
        (
            "principal.hmac.prefix",
            "hmac = { secrets = [{ env = \"A\" }], prefix = \"@\" }",
            ["a", "b"],
            "principal[p].hmac",
        ),
        (
            "principal.hmac.encoding",
            "hmac = { secrets = [{ env = \"A\" }], encoding = \"@\" }",
            ["hex", "base64"],
            "principal[p].hmac",
        ),
        (
            "principal.certificate.subjects",
            "certificate = { subjects = [\"CN=@\"] }",
            ["a", "b"],
            "principal[p].certificate",
        ),
        (
            "principal.rate.requests",
            "bearer = [{ env = \"A\" }]\nrate = { requests = @ }",
            ["1", "2"],
            "principal[p].rate",
        ),
        (
            "principal.rate.bytes",
            "bearer = [{ env = \"A\" }]\nrate = { bytes = @ }",
            ["1", "2"],
            "principal[p].rate",
        ),
        (
            "principal.rate.burst",
            "bearer = [{ env = \"A\" }]\nrate = { bytes = 1, burst = \"@\" }",
            ["1s", "2s"],
            "principal[p].rate",
        ),
    ] {
        let text = format!("[[principal]]\nname = \"p\"\n{text}\n");
        add(key, &text, values, reported, Applies);
    }
    // --- routes: tables that there are, then such that there are not
    add(
        "route.path",
        "[[route]]\n@",
        ["", "[[route]]\npath = \"/new\"\n"],
        "route[/new]",
        Applies,
    );
    let d = "database = \"D\"\ntable = \"T\"\nmapping = \"m\"\ndedup = \"ingest-by\"\n";
    for (key, text, values, reported) in [
        (
            "route.envelope",
            "envelope = \"@\"",
            ["fluent-bit", "none"],
            "route[/r].envelope",
        ),
        (
            "route.default_tag",
            "default_tag = \"@\"",
            ["a", "b"],
            "route[/r].default_tag",
        ),
        (
            "route.principals",
            "principals = [\"@\"]",
            ["a", "b"],
            "route[/r].principals",
        ),
        (
            "route.allow",
            "allow = [\"@\"]",
            ["::1", "127.0.0.1"],
            "route[/r].allow",
        ),
        (
            "route.rate.requests",
            "rate = { requests = @ }",
            ["1", "2"],
            "route[/r].rate",
        ),
        (
            "route.rate.bytes",
            "rate = { bytes = @ }",
            ["1", "2"],
            "route[/r].rate",
        ),
        (
            "route.rate.burst",
            "rate = { bytes = 1, burst = \"@\" }",
            ["1s", "2s"],
            "route[/r].rate",
        ),
    ] {
        let text = format!("{PRINCIPALS}{TWO_TABLES}[[route]]\npath = \"/r\"\n{text}\n");
        add(key, &text, values, reported, Applies);
    }
    for (key, value, other, reported) in [
        (
            "route.database",
            "database = \"D\"",
            "database = \"N\"",
            "route[/r].database",
        ),
        (
            "route.table",
            "table = \"T\"",
            "table = \"N\"",
            "route[/r].table",
        ),
        (
            "route.mapping",
            "mapping = \"m\"",
            "mapping = \"n\"",
            "route[/r].mapping",
        ),
        (
            "route.dedup",
            "dedup = \"ingest-by\"",
            "dedup = \"off\"",
            "route[/r].dedup",
        ),
    ] {
        let keys = |value| d.replace(value, "@");
        let r = format!("{TWO_TABLES}[[route]]\npath = \"/r\"\n{}", keys(value));
        add(key, &r, [value, other], reported, Restarts);
        let known = format!(
            "{r}[[route]]\npath = \"/other\"\n{}",
            d.replace(value, other)
        );
        add(key, &known, [other, value], reported, Applies);
    }
    for (table, values, what) in [
        ("", ["durable", "memory"], Applies),
        ("table = \"Delivered\"\n", ["durable", "delivered"], Applies),
        ("table = \"Delivered\"\n", ["delivered", "durable"], Applies),
        ("table = \"Other\"\n", ["durable", "memory"], Restarts),
        ("", ["durable", "delivered"], Restarts),
    ] {
        let text = format!("{TWO_TABLES}[[route]]\npath = \"/r\"\n{table}ack = \"@\"\n");
        add("route.ack", &text, values, "route[/r].ack", what);
    }
    samples
}

#[test]
fn every_key_is_applied_or_named() {
    let samples = samples();
    for (key, before, after, reported, what) in &samples {
        let before = parse(before).unwrap_or_else(|errors| panic!("{key}: {errors}"));
        let mut after = parse(after).unwrap_or_else(|errors| panic!("{key}: {errors}"));
        if *key == "cores" {
            after.cores += 1;
        }
        assert_ne!(before, after, "{key}");
        let Reloaded {
            config,
            changed,
            needs_restart,
        } = Reloaded::new(&before, &after);
        let only = BTreeSet::from([(*reported).to_owned()]);
        match what {
            Applies => {
                assert_eq!((changed, needs_restart), (only, BTreeSet::new()), "{key}");
                assert_eq!(differences(&config, &after), BTreeSet::new(), "{key}");
            }
            Restarts => {
                assert_eq!((changed, needs_restart), (BTreeSet::new(), only), "{key}");
                assert_eq!(config, before, "{key}");
            }
        }
    }
    let keys = code_keys();
    let is_table = |key: &String| {
        keys.iter()
            .any(|other| other.starts_with(&format!("{key}.")))
    };
    for key in keys.iter().filter(|key| !is_table(key)) {
        // There is only one value.
        let is_single = key == "destination.mode";
        let is_here = samples.iter().any(|(sample, ..)| sample == key);
        assert!(is_here || is_single, "does a reload apply {key}?");
    }
}

#[test]
fn the_document_says_the_same() {
    let (_, section) = DOCUMENT.split_once("\n## Reloading\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let listed = |start: &str| -> Vec<&str> {
        let line = section.lines().find(|line| line.starts_with(start));
        let line = line.unwrap_or_else(|| panic!("no {start:?}"));
        line.split('`').skip(1).step_by(2).collect()
    };
    // A key is where it is named, or else where its table is.
    let nearest = |list: &[&str], key: &str| -> usize {
        let names = list.iter().filter(|name| {
            let rest = key.strip_prefix(**name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        });
        names.map(|name| name.len()).max().unwrap_or(0)
    };
    let lists = [
        (listed("- applied: "), [Applies].as_slice()),
        (
            listed("- applied where the node has the table: "),
            &[Applies, Restarts],
        ),
        (listed("- after a restart: "), &[Restarts]),
    ];
    let keys = code_keys();
    for (list, _) in &lists {
        for name in list {
            let is_key = keys
                .iter()
                .any(|key| key == name || key.starts_with(&format!("{name}.")));
            assert!(is_key, "{name} is no key");
        }
    }
    for key in keys {
        let samples = samples();
        let whats = samples.iter().filter(|(sample, ..)| *sample == key);
        let whats: Vec<What> = whats.map(|(.., what)| *what).collect();
        let (_, of_document) = lists
            .iter()
            .max_by_key(|(list, _)| nearest(list, &key))
            .filter(|(list, _)| nearest(list, &key) > 0)
            .unwrap_or_else(|| panic!("{key} is not listed"));
        let is_same = whats.iter().all(|what| of_document.contains(what))
            && (whats.is_empty() || of_document.iter().all(|what| whats.contains(what)));
        assert!(
            is_same,
            "{key}: {whats:?}, and the document says {of_document:?}"
        );
    }
}

#[test]
fn what_a_restart_is_needed_for_stays_as_it_was_and_the_rest_of_the_route_is_applied() {
    let before = parse(
        "[[principal]]\nname = \"a\"\nbearer = [{ env = \"A\" }]\n\
         [[route]]\npath = \"/r\"\nenvelope = \"none\"\n[[route]]\npath = \"/gone\"\n",
    )
    .unwrap();
    let file = parse(
        "[[principal]]\nname = \"a\"\nbearer = [{ env = \"A\" }]\n\
         [[route]]\npath = \"/new\"\ntable = \"New\"\n\
         [[route]]\npath = \"/r\"\ntable = \"New\"\nprincipals = [\"a\"]\ndefault_tag = \"t\"\n",
    )
    .unwrap();
    let Reloaded {
        config,
        changed,
        needs_restart,
    } = Reloaded::new(&before, &file);
    assert_eq!(
        config.routes,
        [Route {
            principals: Some(vec![0]),
            ..before.routes[0].clone()
        }]
    );
    assert_eq!(
        changed.into_iter().collect::<Vec<_>>(),
        ["route[/gone]", "route[/r].principals"]
    );
    assert_eq!(
        needs_restart.into_iter().collect::<Vec<_>>(),
        [
            "route[/new]",
            "route[/r].default_tag",
            "route[/r].envelope",
            "route[/r].table"
        ]
    );
}

#[test]
fn principals_are_known_by_name_wherever_they_stand() {
    let a = "[[principal]]\nname = \"a\"\nbearer = [{ env = \"A\" }]\n";
    let b = "[[principal]]\nname = \"b\"\nbearer = [{ env = \"B\" }]\n";
    let rest = "[[listener]]\naddress = \"127.0.0.1:1\"\nprincipals = [\"a\", \"b\"]\n\
                [[route]]\nprincipals = [\"b\"]\n";
    let before = parse(&format!("{a}{b}{rest}")).unwrap();
    let file = parse(&format!("{b}{a}{rest}")).unwrap();
    let reloaded = Reloaded::new(&before, &file);
    assert_eq!(reloaded.changed, BTreeSet::new());
    assert_eq!(reloaded.needs_restart, BTreeSet::new());
    assert_eq!(reloaded.config, file);
    // A listener that the file no longer has goes on with those who are still known.
    let file = parse(&format!("{b}[[route]]\nprincipals = [\"b\"]\n")).unwrap();
    let reloaded = Reloaded::new(&before, &file);
    assert_eq!(reloaded.config.listeners.len(), 1);
    assert_eq!(reloaded.config.listeners[0].principals, Some(vec![0]));
    let named: Vec<String> = reloaded.needs_restart.into_iter().collect();
    assert_eq!(named, ["listener[127.0.0.1:1]", "listener[127.0.0.1:9880]"]);
}

#[test]
fn listeners_of_one_address_are_told_apart_by_their_order() {
    let text = |allow: &str| {
        format!(
            "[[listener]]\naddress = \"127.0.0.1:0\"\n[[listener]]\naddress = \"127.0.0.1:0\"\nallow = [\"{allow}\"]\n"
        )
    };
    let reloaded = Reloaded::new(&parse(&text("::1")).unwrap(), &parse(&text("::2")).unwrap());
    let changed: Vec<String> = reloaded.changed.into_iter().collect();
    assert_eq!(changed, ["listener[127.0.0.1:0 #2].allow"]);
    assert_eq!(reloaded.needs_restart, BTreeSet::new());
}
