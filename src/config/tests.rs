//! Tests of the configuration as a whole: its defaults, its errors, and its document.

use super::*;
use std::collections::BTreeSet;

use crate::limits::{SLAB_COUNT_MAX, TAG_SIZE_MAX, upload_buffer_size_min};

pub(super) const DOCUMENT: &str = include_str!("../../docs/CONFIG.md");

pub(super) fn parse(text: &str) -> Result<Config, ConfigErrors> {
    Config::parse(text, Path::new("weir.toml"), Path::new(""))
}

/// The only error of `text`, without the file's name.
#[track_caller]
fn error_of(text: &str) -> String {
    let errors = parse(text).expect_err("this must not be valid");
    assert_eq!(errors.errors.len(), 1, "{errors}");
    let text = errors.to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    text.strip_prefix("weir.toml:").unwrap().to_owned()
}

#[track_caller]
fn assert_error(text: &str, start: &str, part: &str) {
    let error = error_of(text);
    assert!(error.starts_with(start), "{error}");
    assert!(error.contains(part), "{error}");
}

#[test]
fn an_empty_file_means_the_defaults() {
    assert_eq!(parse("").unwrap(), Config::default());
    assert_eq!(
        parse("[batch]\n[slabs]\n[memory]").unwrap(),
        Config::default()
    );
}

#[test]
fn every_key_changes_what_it_names() {
    let text = r#"
        cores = "all"
        [[listener]]
        address = "[::1]:0"
        [[listener]]
        address = "[::1]:0"
        principals = ["c", "a"]
        allow = ["::1", "10.0.0.0/8"]
        proxies = ["192.168.0.0/16"]
        http2 = true
        [admin]
        address = "0.0.0.0:1"
        [destination]
        type = "null"
        [spool]
        directory = "/var/spool/weir"
        size = "2GiB"
        [batch]
        max_age = "500ms"
        [compression]
        level = 9
        [response]
        status = 204
        [slabs]
        registered = "require"
        classes = [{ size = 16384, count = 1 }]
        [uplink]
        concurrency = 64
        [dead_letter]
        directory = "/var/lib/weir/dead"
        size = "3GiB"
        age = "30days"
        [upload]
        buffer_count = 2
        buffer_size = "8MiB"
        [limits]
        wait = "1m 30s"
        connections = 1
        record = "64KiB"
        ack = "9s"
        drain = "1day"
        connections_per_address = 2
        requests_per_connection = 3
        [deadlines]
        handshake = "7s"
        head = "1s"
        body_start = "2s"
        body = "3s"
        body_rate = 5
        body_rate_window = "4s"
        contended = "8s"
        write = "5s"
        idle = "6s"
        [http2]
        connections = 7
        streams = 9
        window = "128KiB"
        [memory]
        limit = "1GiB"
        [[principal]]
        name = "a"
        bearer = [
            { env = "TOKEN" },
            { file = "token" },
            { sha256 = "00000000000000000000000000000000000000000000000000000000000000fF" },
        ]
        rate = { requests = 10 }
        [[principal]]
        name = "b"
        basic = { user = "u", passwords = [{ file = "/password" }] }
        rate = { requests = 10, bytes = "1MiB", burst = "2s" }
        [[principal]]
        name = "c"
        hmac = { secrets = [{ env = "KEY" }] }
        [[principal]]
        name = "d"
        hmac = { secrets = [{ env = "KEY" }], header = "X-Sum", prefix = "", encoding = "base64" }
        [[route]]
        path = "/a"
        envelope = "none"
        principals = ["b"]
        allow = ["10.0.0.1"]
        rate = { bytes = 7 }
        ack = "delivered"
        [[route]]
        path = "/a/*"
        ack = "memory"
        database = "D-1"
        table = "T 1.x"
        default_tag = "t"
        [[route]]
        path = "/*"
    "#;
    let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let listener = |principals, allow: &[&str], proxies: &[&str]| Listener {
        address: "[::1]:0".parse().unwrap(),
        principals,
        allow: networks(allow),
        proxies: networks(proxies),
        http2: !proxies.is_empty(),
        tls: None,
    };
    let rate = |requests, bytes, seconds| {
        Some(Rate {
            requests,
            bytes,
            burst: Duration::from_secs(seconds),
        })
    };
    let mut hash = [0; 32];
    hash[31] = 0xff;
    let principal = |name: &str, credential, rate| Principal {
        name: name.into(),
        credential,
        rate,
    };
    let key = vec![SecretSource::Env("KEY".into())];
    let principals = vec![
        principal(
            "a",
            Credential::Bearer(vec![
                Token::Secret(SecretSource::Env("TOKEN".into())),
                Token::Secret(SecretSource::File("token".into())),
                Token::Sha256(hash),
            ]),
            rate(Some(10), None, 1),
        ),
        principal(
            "b",
            Credential::Basic {
                user: "u".into(),
                passwords: vec![SecretSource::File("/password".into())],
            },
            rate(Some(10), Some(1 << 20), 2),
        ),
        principal(
            "c",
            Credential::Hmac(Hmac {
                secrets: key.clone(),
                ..Hmac::default()
            }),
            None,
        ),
        principal(
            "d",
            Credential::Hmac(Hmac {
                secrets: key,
                header: "X-Sum".into(),
                prefix: "".into(),
                encoding: SignatureEncoding::Base64,
            }),
            None,
        ),
    ];
    let route = |pattern, table_index, envelope, ack, default_tag: &str| Route {
        pattern,
        table_index,
        envelope,
        ack,
        default_tag: default_tag.into(),
        principals: None,
        allow: Vec::new(),
        rate: None,
    };
    let table = |database: &str, table: &str, spooled| Table {
        database: database.into(),
        table: table.into(),
        mapping: None,
        dedup: Dedup::Off,
        spooled,
        delivered: spooled,
    };
    let expected = Config {
        cores: std::thread::available_parallelism().unwrap().into(),
        listeners: vec![
            listener(None, &[], &[]),
            listener(
                Some(vec![2, 0]),
                &["::1/128", "10.0.0.0/8"],
                &["192.168.0.0/16"],
            ),
        ],
        admin: Admin {
            address: "0.0.0.0:1".parse().unwrap(),
        },
        destination: Destination::Null,
        spool: Spool {
            directory: "/var/spool/weir".into(),
            size: 2 << 30,
        },
        uplink: Uplink { concurrency: 64 },
        dead_letter: DeadLetter {
            directory: "/var/lib/weir/dead".into(),
            size: 3 << 30,
            age: Some(Duration::from_secs(30 * 24 * 60 * 60)),
        },
        batch: Batch {
            max_age: Duration::from_millis(500),
        },
        compression: Compression { level: 9 },
        response: Response {
            status: SuccessStatus::NoContent,
        },
        slabs: Slabs {
            registered: Registered::Require,
            classes: vec![SlabClass {
                size: 16 * KIB,
                count: 1,
            }],
        },
        upload: Upload {
            buffer_count: 2,
            buffer_size: 8 * MIB,
        },
        limits: Limits {
            wait: Duration::from_secs(90),
            connections: 1,
            connections_per_address: 2,
            requests_per_connection: 3,
            record: 64 * KIB,
            ack: Duration::from_secs(9),
            drain: Duration::from_secs(24 * 60 * 60),
        },
        deadlines: Deadlines {
            handshake: Duration::from_secs(7),
            head: Duration::from_secs(1),
            body_start: Duration::from_secs(2),
            body: Duration::from_secs(3),
            body_rate: 5,
            body_rate_window: Duration::from_secs(4),
            contended: Duration::from_secs(8),
            write: Duration::from_secs(5),
            idle: Duration::from_secs(6),
        },
        http2: Http2 {
            connections: 7,
            streams: 9,
            window: 128 * KIB,
        },
        memory: Memory {
            limit: Some(1 << 30),
        },
        principals,
        routes: vec![
            Route {
                principals: Some(vec![1]),
                allow: vec!["10.0.0.1/32".parse().unwrap()],
                rate: rate(None, Some(7), 1),
                ..route(
                    PathPattern::Exact("/a".into()),
                    0,
                    Envelope::None,
                    Ack::Delivered,
                    "http.0",
                )
            },
            route(
                PathPattern::Prefix("/a/".into()),
                1,
                Envelope::FluentBit,
                Ack::Memory,
                "t",
            ),
            // The first route's table again.
            route(
                PathPattern::Prefix("/".into()),
                0,
                Envelope::FluentBit,
                Ack::Durable,
                "http.0",
            ),
        ],
        tables: vec![
            table("Telemetry", "Events", true),
            table("D-1", "T 1.x", false),
        ],
    };
    assert_eq!(parse(text).unwrap(), expected);
}

#[test]
fn relative_paths_start_at_the_file() {
    let path_of = |text| {
        let config = Config::parse(text, Path::new("/etc/weir.toml"), Path::new("/etc")).unwrap();
        match config.destination {
            Destination::Directory { path } => path,
            other => panic!("not a directory: {other:?}"),
        }
    };
    assert_eq!(path_of(""), Path::new("/etc/out"));
    assert_eq!(
        path_of("[destination]\npath = \"a/b\""),
        Path::new("/etc/a/b")
    );
    assert_eq!(path_of("[destination]\npath = \"/b\""), Path::new("/b"));
}

#[test]
fn unknown_keys_say_what_was_meant() {
    for (text, expected) in [
        (
            "[compression]\nlevl = 3",
            "2:1: compression.levl: unknown key `levl`; did you mean `level`?",
        ),
        (
            "\n\n[[rout]]\npath = \"/\"",
            "3:3: rout[0]: unknown key `rout`; did you mean `route`?",
        ),
        (
            "[[route]]\n[[route]]\n  Table = \"x\"",
            "3:3: route[1].Table: unknown key `Table`; did you mean `table`?",
        ),
        (
            "batch.maxage = \"1s\"",
            "1:7: batch.maxage: unknown key `maxage`; did you mean `max_age`?",
        ),
        (
            "[slabs]\nclasses = [{ size = \"16KiB\", cuont = 1 }]",
            "2:30: slabs.classes[0].cuont: unknown key `cuont`; did you mean `count`?",
        ),
        (
            "[memory]\nzzzzzz = 1",
            "2:1: memory.zzzzzz: unknown key `zzzzzz`; remove it or use `limit`",
        ),
    ] {
        assert_eq!(error_of(text), expected);
    }
}

#[test]
fn columns_are_characters() {
    assert_error(
        "[destination]\n\"ä\" = { 'ö' = 1 }",
        "2:1: destination.ä: ",
        "",
    );
    assert_error(
        "destination = { path = \"äöü\", typ = 1 }",
        "1:31: destination.typ: ",
        "`type`",
    );
}

#[test]
fn what_is_shown_of_the_file_stays_on_its_line() {
    assert_error(
        "\"a\\nb\\u001b[2J\" = 1",
        "1:1: a\\nb\\u{1b}[2J: unknown key ",
        "",
    );
}

#[test]
fn all_errors_are_told_at_once_in_the_order_of_the_file() {
    let shape = parse("corse = 1\n[batch]\nmaxage = 1\n[limits]\nwait = 1").unwrap_err();
    let lines: Vec<usize> = shape.errors.iter().map(|error| error.line).collect();
    assert_eq!(lines, [1, 3, 5], "{shape}");
    let values = parse("cores = 0\n[limits]\nwait = \"x\"\n[batch]\nmax_age = \"0s\"").unwrap_err();
    let lines: Vec<usize> = values.errors.iter().map(|error| error.line).collect();
    assert_eq!(lines, [1, 3, 5], "{values}");
}

#[test]
fn the_search_for_errors_ends() {
    let text: String = (0..1000).map(|index| format!("zz{index} = 1\n")).collect();
    assert!(parse(&text).unwrap_err().errors.len() < 100);
    // Nothing here can be removed.
    for text in [
        "listener = [1, 2]",
        "slabs.classes = [[], []]",
        "route = [[]]",
    ] {
        error_of(text);
    }
}

#[test]
fn what_is_not_toml_is_placed() {
    assert_error("[batch\n", "1:7: ", "unclosed");
    assert_error("cores = 1\ncores = 1\n", "2:1: ", "duplicate key");
}

#[test]
fn types_are_told_in_the_words_of_toml() {
    for (text, start, part) in [
        ("slabs = 3", "1:9: slabs: ", "expected a table"),
        (
            "admin = [\"127.0.0.1:1\"]",
            "1:9: admin",
            "expected a table",
        ),
        ("[route]\npath = \"/\"", "1:1: route: ", "expected an array"),
        (
            "compression.level = \"2\"",
            "1:21: ",
            "expected a whole number",
        ),
        (
            "batch.max_age = 10",
            "1:17: batch.max_age: ",
            "such as \"10s\"",
        ),
        ("upload.buffer_size = 1.5", "1:22: ", "such as \"8MiB\""),
        ("cores = true", "1:9: cores: ", "\"all\""),
    ] {
        assert_error(text, start, part);
    }
}

#[test]
fn values_out_of_bounds_are_refused() {
    for (text, start, part) in [
        ("cores = 0", "1:9: cores: ", "0 is out of bounds"),
        ("cores = 100000", "1:9: cores: ", "may use"),
        ("cores = \"al\"", "1:9: cores: ", "did you mean `all`?"),
        ("listener = []", "1:12: listener: ", "1 to 64"),
        ("admin.address = \"localhost:1\"", "1:17: ", "not looked up"),
        (
            "destination.type = \"nul\"",
            "1:20: ",
            "did you mean `null`?",
        ),
        (
            "destination.type = \"kafka\"",
            "1:20: ",
            "use `directory`, `null` or `kusto`",
        ),
        (
            "destination.path = \"\"",
            "1:20: destination.path: ",
            "not a path",
        ),
        ("batch.max_age = \"0s\"", "1:17: ", "longer than nothing"),
        ("limits.wait = \"25h\"", "1:15: limits.wait: ", "too long"),
        (
            "limits.drain = \"5\"",
            "1:16: limits.drain: ",
            "not a duration",
        ),
        ("compression.level = 0", "1:21: ", "use 1 to 9"),
        ("compression.level = 10", "1:21: ", "use 1 to 9"),
        ("response.status = 202", "1:19: ", "200, 201 or 204"),
        (
            "slabs.registered = \"always\"",
            "1:20: ",
            "`require` or `never`",
        ),
        ("upload.buffer_count = 1", "1:23: ", "use 2 to 1024"),
        (
            "upload.buffer_size = \"8MB\"",
            "1:22: ",
            "did you mean \"8MiB\"?",
        ),
        (
            "upload.buffer_size = \"2GiB\"",
            "1:22: ",
            "use 1GiB or less",
        ),
        ("limits.connections = 0", "1:22: ", "use 1 to"),
        ("limits.connections = -1", "1:22: ", "-1 is out of bounds"),
        ("http2.connections = 0", "1:21: ", "use 1 to 65536"),
        ("http2.streams = 1001", "1:17: ", "use 1 to 1000"),
        ("http2.window = \"15KiB\"", "1:16: ", "use 16KiB or more"),
        ("http2.window = \"3MiB\"", "1:16: ", "use 2MiB or less"),
        ("limits.record = 0", "1:17: limits.record: ", "too small"),
        ("memory.limit = -1", "1:16: memory.limit: ", "positive"),
        ("memory.limit = \"1023KiB\"", "1:16: ", "use 1MiB or more"),
    ] {
        assert_error(text, start, part);
    }
}

#[test]
fn slab_classes_are_whole_pages_in_ascending_order() {
    let classes = |classes: &str| format!("slabs.classes = [{classes}]");
    for (text, part) in [
        ("", "no slab class"),
        ("{ size = \"16KiB\" }", "add the missing one"),
        ("{ size = \"12KiB\", count = 1 }", "use 16KiB or more"),
        ("{ size = \"17KiB\", count = 1 }", "use 16KiB or 20KiB"),
        ("{ size = \"1GiB\", count = 0 }", "use 1 to 1024"),
        (
            "{ size = \"32KiB\", count = 1 }, { size = \"32KiB\", count = 1 }",
            "ascending size",
        ),
        (
            "{ size = \"64KiB\", count = 1 }, { size = \"32KiB\", count = 1 }",
            "32KiB does not follow 64KiB",
        ),
        (
            "{ size = \"16KiB\", count = 1024 }, { size = \"32KiB\", count = 1 }",
            "1025 slabs",
        ),
        (
            &(1..10).fold(String::new(), |text, index| {
                format!("{text}{{ size = \"{}KiB\", count = 1 }},", index * 16)
            }),
            "9 slab classes",
        ),
    ] {
        assert_error(&classes(text), "1:", part);
    }
    let most = format!("{{ size = \"16KiB\", count = {SLAB_COUNT_MAX} }}");
    assert!(parse(&classes(&most)).is_ok());
    assert!(parse(&classes("{ size = \"1GiB\", count = 1 }")).is_ok());
}

#[test]
fn the_largest_record_fits_an_empty_upload_buffer() {
    let text = |buffer_size: usize| {
        format!("[upload]\nbuffer_size = {buffer_size}\n[limits]\nrecord = \"1MiB\"")
    };
    let least = upload_buffer_size_min(MIB);
    assert!(parse(&text(least)).is_ok());
    assert_error(
        &text(least - 1),
        "2:15: upload.buffer_size: ",
        "limits.record",
    );
    // The default buffer counts as well, and then the record's key is the one to point at.
    assert_error(
        "limits.record = \"4MiB\"",
        "1:17: limits.record: ",
        "4676KiB",
    );
}

#[test]
fn listeners_differ_unless_the_kernel_chooses_the_port() {
    let text = |address: &str| format!("[[listener]]\naddress = \"{address}\"\n").repeat(2);
    assert_error(
        &text("127.0.0.1:1"),
        "4:11: listener[1].address: ",
        "already",
    );
    assert!(parse(&text("127.0.0.1:0")).is_ok());
}

#[test]
fn route_paths_are_ones_a_request_can_have() {
    let route = |path: &str| format!("[[route]]\npath = \"{path}\"");
    for path in [
        "/",
        "/*",
        "/a",
        "/a/",
        "/a/*",
        "/a/b.c-d_e~f/*",
        "/%41",
        "/a:@!$&'()+,;=",
        "/...",
    ] {
        assert!(parse(&route(path)).is_ok(), "{path}");
    }
    for (path, part) in [
        ("", "starts with `/`"),
        ("*", "starts with `/`"),
        ("a", "did you mean \\\"/a\\\"?"),
        ("/a*", "only as the last segment"),
        ("/*/a", "only as the last segment"),
        ("/**", "only as the last segment"),
        ("/a?b", "'?'"),
        ("/a#b", "'#'"),
        ("/a b", "' '"),
        ("/ä", "'ä'"),
        ("/%4", "'%'"),
        ("/%4g", "'%'"),
        ("//", "no empty segment"),
        ("//*", "no empty segment"),
        ("/a//b", "no empty segment"),
        ("/./a", "no empty segment"),
        ("/a/..", "no empty segment"),
        ("/../*", "no empty segment"),
    ] {
        let part = part.replace("\\\"", "\"");
        assert_error(&route(path), "2:8: route[0].path: ", &part);
    }
    let long = format!("/{}", "a".repeat(8 * KIB));
    assert_error(&route(&long), "2:8: ", "longer than a request line");
    // The same path twice, spelt out or by default.
    assert_error("[[route]]\n[[route]]\npath = \"/*\"", "3:8: ", "already");
    assert_error(&[route("/a"), route("/a")].join("\n"), "4:8: ", "already");
}

#[test]
fn names_are_safe_as_directories() {
    let table = |name: &str| format!("[[route]]\ntable = \"{name}\"");
    let long = "a".repeat(255);
    for name in ["a", "A_b-c.d e", "0", &long] {
        assert!(parse(&table(name)).is_ok(), "{name}");
    }
    for name in [
        "", ".", "..", ".a", "a..b", "a/b", "a\\\\b", " a", "a ", "ä", "a\\u0000", "a'b",
    ] {
        assert_error(&table(name), "2:9: route[0].table: ", "");
    }
    assert_error(&table(&"a".repeat(256)), "2:9: ", "1 to 255");
    assert_error(
        "[[route]]\ndatabase = \"../x\"",
        "2:12: route[0].database: ",
        "",
    );
    // Without a directory only Kusto's own bound holds.
    let null = "destination.type = \"null\"\n";
    assert!(parse(&format!("{null}{}", table(&"a".repeat(1024)))).is_ok());
    assert!(parse(&format!("{null}{}", table(&"a".repeat(1025)))).is_err());
}

#[test]
fn a_default_tag_needs_no_escaping() {
    let tag = |tag: &str| format!("[[route]]\ndefault_tag = \"{tag}\"");
    assert!(parse(&tag(&"a".repeat(TAG_SIZE_MAX))).is_ok());
    for text in [
        "",
        "a b",
        "a\\\"b",
        "a/b",
        "ä",
        &"a".repeat(TAG_SIZE_MAX + 1),
    ] {
        assert_error(&tag(text), "2:15: route[0].default_tag: ", "letters");
    }
}

#[test]
fn who_may_send_is_checked() {
    let bearer = |secret: &str| format!("[[principal]]\nname = \"a\"\nbearer = [{secret}]");
    for (text, start, part) in [
        (
            "[[principal]]\nbearer = [{ env = \"T\" }]".into(),
            "1:1: principal[0]: ",
            "`name`",
        ),
        (
            "[[principal]]\nname = \"a\"".into(),
            "1:1: ",
            "one of `bearer`",
        ),
        (
            format!(
                "{}\nhmac = {{ secrets = [{{ env = \"K\" }}] }}",
                bearer("{ env = \"T\" }")
            ),
            "1:1: ",
            "one of `bearer`",
        ),
        (bearer(""), "3:10: principal[0].bearer: ", "1 to 8"),
        (bearer("{}"), "3:11: ", "`{ env"),
        (bearer("{ env = \"T\", file = \"t\" }"), "3:11: ", "`{ env"),
        (bearer("{ env = \"\" }"), "3:11: ", "`{ env"),
        (
            bearer("{ sha256 = \"ab\" }"),
            "3:22: ",
            "64 hexadecimal digits",
        ),
        (bearer("{ evn = \"T\" }"), "3:13: ", "did you mean `env`?"),
        (
            "[[principal]]\nname = \"a\"\nbasic = { user = \"u\" }".into(),
            "3:9: ",
            "`passwords`",
        ),
        (
            "[[principal]]\nname = \"a\"\nbasic = { user = \"u:\", passwords = [{ env = \"P\" }] }"
                .into(),
            "3:18: ",
            "no colon",
        ),
        (
            "[[principal]]\nname = \"a\"\nhmac = {}".into(),
            "3:8: ",
            "`secrets`",
        ),
        (
            "[[principal]]\nname = \"a\"\nhmac = { secrets = [{ env = \"K\" }], header = \"a b\" }"
                .into(),
            "3:46: ",
            "header field",
        ),
        (
            "[[principal]]\nname = \"a\"\nhmac = { secrets = [{ sha256 = \"K\" }] }".into(),
            "3:21: ",
            "only a bearer token",
        ),
        (
            "[[route]]\nprincipals = [\"a\"]".into(),
            "2:15: ",
            "add a [[principal]]",
        ),
        ("[[route]]\nprincipals = []".into(), "2:14: ", "nobody"),
        (
            format!(
                "{}\n[[route]]\nprincipals = [\"b\"]",
                bearer("{ env = \"T\" }")
            ),
            "5:15: ",
            "did you mean `a`?",
        ),
        (
            "[[listener]]\nallow = [\"10.0.0.1/8\"]".into(),
            "2:10: ",
            "did you mean \"10.0.0.0/8\"?",
        ),
        (
            "[[listener]]\nallow = [\"localhost\"]".into(),
            "2:10: ",
            "not a network",
        ),
        ("[[listener]]\nallow = []".into(), "2:9: ", "1 to 256"),
        (
            "[[route]]\nrate = {}".into(),
            "2:8: route[0].rate: ",
            "`requests` or `bytes`",
        ),
        (
            "[[route]]\nrate = { requests = 0 }".into(),
            "2:21: ",
            "out of bounds",
        ),
    ] {
        assert_error(&text, start, part);
    }
}

#[test]
fn a_secret_in_the_file_is_refused_and_not_repeated() {
    for text in [
        "[[principal]]\nname = \"a\"\nbearer = [\"canary\"]",
        "[[principal]]\nname = \"a\"\nhmac = { secrets = [\"canary\"] }",
        "[[principal]]\nname = \"a\"\nbasic = { user = \"u\", passwords = [\"canary\"] }",
        "[[principal]]\nname = \"a\"\nbearer = [{ value = \"canary\" }]",
    ] {
        let error = error_of(text);
        assert!(!error.contains("canary"), "{error}");
        assert!(error.starts_with("3:"), "{error}");
    }
    let error = error_of("[[principal]]\nname = \"a\"\nbearer = [\"canary\"]");
    assert!(error.contains("does not belong into this file"), "{error}");
}

#[test]
fn more_tables_than_the_pool_serves_is_a_warning() {
    let tables = |count: usize| {
        let routes: String = (0..count)
            .map(|index| format!("[[route]]\npath = \"/{index}\"\ntable = \"{index}\"\n"))
            .collect();
        parse(&routes).unwrap().warnings()
    };
    assert!(tables(3).is_empty());
    let warnings = tables(4);
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].ends_with("upload.buffer_count to 5 or more"));
    let http2 = |listener: &str| {
        let text = format!("[[listener]]\n{listener}\n[http2]\nstreams = 10\n");
        parse(&text).unwrap().warnings()
    };
    assert!(http2("")[0].contains("http2 = true"));
    assert!(http2("http2 = true").is_empty());
}

// --- Kusto ----------------------------------------------------------------------------------------

/// The least that makes Kusto the destination; more keys of `[destination]` may follow.
const KUSTO: &str = "[destination]
type = \"kusto\"
ingest_uri = \"https://ingest-c.westeurope.kusto.windows.net\"
identity = { managed_identity = \"system\" }
";

/// The destination of `[destination]` with these lines, relative to `/etc`.
fn kusto(lines: &str) -> Result<KustoConfig, ConfigErrors> {
    let text = format!("[destination]\ntype = \"kusto\"\n{lines}");
    let config = Config::parse(&text, Path::new("weir.toml"), Path::new("/etc"))?;
    match config.destination {
        Destination::Kusto(config) => Ok(config),
        other => panic!("not Kusto: {other:?}"),
    }
}

const ENDPOINT: &str = "ingest_uri = \"https://ingest-c.westeurope.kusto.windows.net/\"\n";

#[test]
fn kusto_is_configured_as_its_issue_shows() {
    let text = r#"
        [destination]
        type = "kusto"
        ingest_uri = "https://ingest-mycluster.westeurope.kusto.windows.net"
        identity = { managed_identity = "system" }
        mode = "queued"

        [[route]]
        path = "/github/*"
        database = "Telemetry"
        table = "GitHub"
        mapping = "github_v1"
        dedup = "ingest-by"

        [[route]]
        database = "Telemetry"
        table = "GitHub"
    "#;
    let config = parse(text).unwrap();
    assert_eq!(config.warnings(), Vec::<String>::new());
    let Destination::Kusto(destination) = config.destination else {
        panic!("not Kusto")
    };
    assert_eq!(
        destination,
        KustoConfig {
            ingest_uri: "https://ingest-mycluster.westeurope.kusto.windows.net"
                .parse()
                .unwrap(),
            identity: Identity::Managed { client_id: None },
            mode: Mode::Queued,
            trusted_hosts: Vec::new(),
        }
    );
    // Another mapping is another batch, so also another upload buffer.
    assert_eq!(config.tables.len(), 2);
    assert_eq!(config.tables[0].mapping.as_deref(), Some("github_v1"));
    assert_eq!(config.tables[0].dedup, Dedup::IngestBy);
    assert_eq!(config.tables[1].mapping, None);
}

#[test]
fn every_identity_is_read() {
    use crate::secret::SecretSource;
    let id = |text: &str| Some(text.to_owned());
    for (text, expected) in [
        (
            "{ managed_identity = { client_id = \"a-1\" } }",
            Identity::Managed {
                client_id: id("a-1"),
            },
        ),
        (
            "{ workload_identity = {} }",
            Identity::Workload {
                tenant: None,
                client_id: None,
                token_file: None,
            },
        ),
        (
            "{ workload_identity = { tenant = \"t\", client_id = \"c\", token_file = \"f\" } }",
            Identity::Workload {
                tenant: id("t"),
                client_id: id("c"),
                token_file: Some("/etc/f".into()),
            },
        ),
        (
            "{ client_secret = { tenant = \"t.example\", client_id = \"c\", secret = { env = \"S\" } } }",
            Identity::ClientSecret {
                tenant: "t.example".into(),
                client_id: "c".into(),
                secret: SecretSource::Env("S".into()),
            },
        ),
        (
            "{ client_certificate = { tenant = \"t\", client_id = \"c\", certificate = { file = \"/c.pem\" } } }",
            Identity::ClientCertificate {
                tenant: "t".into(),
                client_id: "c".into(),
                certificate: SecretSource::File("/c.pem".into()),
            },
        ),
        ("{ azure_cli = {} }", Identity::AzureCli),
    ] {
        let config = kusto(&format!("{ENDPOINT}identity = {text}")).unwrap();
        assert_eq!(config.identity, expected, "{text}");
    }
}

#[test]
fn endpoints_are_checked_before_anything_is_sent() {
    let uri = |uri: &str| format!("ingest_uri = \"{uri}\"\nidentity = {{ azure_cli = {{}} }}\n");
    for (text, part) in [
        ("ingest-c.kusto.windows.net", "not a URL"),
        ("https://evil.example", "destination.trusted_hosts"),
        ("http://ingest-c.kusto.windows.net", "https"),
        (
            "https://c.westeurope.kusto.windows.net",
            "did you mean \"https://ingest-c.westeurope",
        ),
        ("https://u:canary@ingest-c.kusto.windows.net", "remove it"),
        ("https://ingest-c.kusto.windows.net/v1", "without path"),
        (
            "https://ingest-c.kusto.windows.net?sig=canary",
            "without path",
        ),
    ] {
        let error = kusto(&uri(text)).unwrap_err().to_string();
        assert!(
            error.starts_with("weir.toml:3:14: destination.ingest_uri: "),
            "{error}"
        );
        assert!(error.contains(part) && !error.contains("canary"), "{error}");
    }
    for text in [
        "http://127.0.0.1:8080",
        "https://ingest-c.kusto.windows.net:443/",
    ] {
        assert!(kusto(&uri(text)).is_ok(), "{text}");
    }
    let own = format!(
        "{}trusted_hosts = [\".example.com\"]",
        uri("https://adx.example.com")
    );
    assert!(kusto(&own).is_ok());
}

#[test]
fn what_kusto_needs_is_named() {
    let error = kusto("").unwrap_err();
    assert_eq!(error.errors.len(), 2, "{error}");
    for (lines, start, part) in [
        ("identity = {}", "4:12: ", "0 identities"),
        (
            "identity = { azure_cli = {}, workload_identity = {} }",
            "4:12: ",
            "2 identities",
        ),
        (
            "identity = { azure_clu = {} }",
            "4:14: ",
            "did you mean `azure_cli`?",
        ),
        (
            "identity = { azure_cli = { x = 1 } }",
            "4:28: ",
            "remove it",
        ),
        (
            "identity = { managed_identity = \"user\" }",
            "4:33: ",
            "\"system\"",
        ),
        (
            "identity = { managed_identity = { id = \"x\" } }",
            "4:33: ",
            "client_id",
        ),
        (
            "identity = { client_secret = { tenant = \"t\", client_id = \"c\" } }",
            "4:30: ",
            "add the missing",
        ),
        (
            "identity = { client_secret = { tenant = \"t/u\", client_id = \"c\", secret = { env = \"S\" } } }",
            "4:41: ",
            "`tenant` has",
        ),
        (
            "identity = { azure_cli = {} }\nmode = \"streaming\"",
            "5:8: ",
            "use `queued`",
        ),
        (
            "identity = { azure_cli = {} }\ntrusted_hosts = [\"a.example\", \"https://b\"]",
            "5:31: ",
            "without scheme",
        ),
        (
            "identity = { azure_cli = {} }\ntrusted_hosts = [\".com\"]",
            "5:18: ",
            "not a host",
        ),
    ] {
        let error = kusto(&format!("{ENDPOINT}{lines}"))
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(&format!("weir.toml:{start}")), "{error}");
        assert!(error.contains(part), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn a_secret_in_the_configuration_is_refused_and_not_repeated() {
    for secret in [
        "\"canary\"",
        "{ text = \"canary\" }",
        "[\"canary\"]",
        "{ env = [\"canary\"] }",
    ] {
        let identity = format!(
            "identity = {{ client_secret = {{ tenant = \"t\", client_id = \"c\", secret = {secret} }} }}"
        );
        let error = kusto(&format!("{ENDPOINT}{identity}"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("{ env = \"NAME\" } or { file = \"path\" }"),
            "{error}"
        );
        assert!(!error.contains("canary"), "{error}");
    }
}

#[test]
fn keys_of_kusto_are_not_silently_ignored_by_others() {
    assert_error(
        "[destination]\nmode = \"queued\"",
        "2:8: destination.mode: ",
        "set the type",
    );
    let null = "destination.type = \"null\"\ndestination.ingest_uri = \"x\"";
    assert_error(null, "2:26: ", "set the type");
    let warnings = parse("[[route]]\nmapping = \"m\"").unwrap().warnings();
    assert!(warnings[0].contains("route.mapping"), "{warnings:?}");
    assert_error(
        "[[route]]\nmapping = \"\"",
        "2:11: route[0].mapping: ",
        "remove the key",
    );
    assert_error("[[route]]\ndedup = \"on\"", "2:9: ", "`ingest-by`");
}

// --- docs/CONFIG.md -------------------------------------------------------------------------------

/// The rows of the document's tables of keys: key and default, without backticks.
fn document_rows() -> Vec<(String, String)> {
    let plain = |cell: &str| cell.trim().trim_matches('`').to_owned();
    DOCUMENT
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| {
            let cells: Vec<&str> = line.split(" | ").collect();
            assert_eq!(cells.len(), 4, "{line}");
            (plain(cells[0].trim_start_matches('|')), plain(cells[2]))
        })
        .collect()
}

/// The document's example, complete and equal to the defaults.
fn document_example() -> &'static str {
    let (_, rest) = DOCUMENT.split_once("```toml\n").unwrap();
    rest.split_once("```").unwrap().0
}

/// TOML that sets the key of this dotted name, as far as the tables above it matter.
fn setting(key: &str, value: &str) -> String {
    match key.rsplit_once('.') {
        None => format!("{key} = {value}"),
        Some((table @ ("listener" | "principal" | "route"), key)) => {
            format!("[[{table}]]\n{key} = {value}")
        }
        Some((table, key))
            if table.starts_with("principal.")
                || ["route.rate", "listener.tls"].contains(&table) =>
        {
            let (array, table) = table.split_once('.').unwrap();
            format!("[[{array}]]\n{table} = {{ {key} = {value} }}")
        }
        Some(("slabs.classes", key)) => format!("slabs.classes = [{{ {key} = {value} }}]"),
        Some((table, key)) => format!("[{table}]\n{key} = {value}"),
    }
}

/// Tables below the sections that have keys of their own.
const NESTED_SECTIONS: [&str; 5] = [
    "slabs.classes",
    "destination.identity",
    "destination.identity.workload_identity",
    "destination.identity.client_secret",
    "destination.identity.client_certificate",
];

/// The keys that the code knows, dotted, from its own refusal of one that it doesn't know.
pub(super) fn code_keys() -> BTreeSet<String> {
    let known = |key: &str| -> Vec<String> {
        let message = error_of(&setting(key, "1"));
        let (_, names) = message.split_once("use ").expect(&message);
        let names = names.split('`').skip(1).step_by(2);
        names.map(str::to_owned).collect()
    };
    let mut keys = BTreeSet::new();
    for section in known("zzzzzzzzzzzz") {
        if section == "cores" {
            keys.insert(section);
            continue;
        }
        for name in known(&format!("{section}.zzzzzzzzzzzz")) {
            keys.insert(format!("{section}.{name}"));
        }
    }
    for section in NESTED_SECTIONS.into_iter().chain([
        "listener.tls",
        "principal.basic",
        "principal.certificate",
        "principal.hmac",
        "principal.rate",
        "route.rate",
    ]) {
        for name in known(&format!("{section}.zzzzzzzzzzzz")) {
            keys.insert(format!("{section}.{name}"));
        }
    }
    keys
}

#[test]
fn the_document_has_every_key_and_no_other() {
    let documented: Vec<String> = document_rows().into_iter().map(|(key, _)| key).collect();
    let unique: BTreeSet<String> = documented.iter().cloned().collect();
    assert_eq!(documented.len(), unique.len(), "a key is documented twice");
    assert_eq!(unique, code_keys());
}

#[test]
fn the_document_has_the_defaults_of_the_code() {
    assert_eq!(parse(document_example()).unwrap(), Config::default());
    for (key, default) in document_rows() {
        match (key.as_str(), default.as_str()) {
            ("dead_letter.age", "none") => assert_eq!(Config::default().dead_letter.age, None),
            ("memory.limit", "none") => assert_eq!(Config::default().memory.limit, None),
            // The example has them.
            ("slabs.classes", _) => {}
            // Without a default there is nothing to compare.
            (_, "required" | "none") => {}
            ("destination.mode" | "destination.trusted_hosts", _) => assert_eq!(
                parse(&format!(
                    "{KUSTO}{} = {default}",
                    &key["destination.".len()..]
                ))
                .unwrap(),
                parse(KUSTO).unwrap(),
                "{key} = {default}"
            ),
            // By default there is no principal, and anybody may send from anywhere as much as they can.
            (key, _) if is_of_access(key) => {}
            // By default there is no TLS.
            (key, _) if key.starts_with("listener.tls") => {}
            _ => assert_eq!(
                parse(&setting(&key, &default)).unwrap(),
                Config::default(),
                "{key} = {default}"
            ),
        }
    }
}

/// Whether the key is one of those that say who may send how much.
fn is_of_access(key: &str) -> bool {
    key.starts_with("principal")
        || ["principals", "allow", "proxies", "rate"]
            .iter()
            .any(|name| {
                key.split_once('.')
                    .is_some_and(|(_, rest)| rest.split('.').next() == Some(name))
            })
}

#[test]
fn the_documents_example_of_access_has_every_key_of_it() {
    let (_, rest) = DOCUMENT.split_once("## Who may send").unwrap();
    let (_, rest) = rest.split_once("```toml\n").unwrap();
    let example = rest.split_once("```").unwrap().0;
    let config = parse(example).unwrap();
    assert!(config.listeners[0].principals.is_some());
    for key in code_keys().into_iter().filter(|key| is_of_access(key)) {
        let name = key.rsplit_once('.').map_or(key.as_str(), |(_, name)| name);
        let is_there = |start: char| example.contains(&format!("{start}{name} = "));
        assert!(is_there('\n') || is_there(' '), "no {key}");
    }
    // What the table says of the defaults.
    let hmac = Hmac::default();
    let defaults: std::collections::HashMap<String, String> = document_rows().into_iter().collect();
    assert_eq!(
        defaults["principal.hmac.header"],
        format!("\"{}\"", hmac.header)
    );
    assert_eq!(
        defaults["principal.hmac.prefix"],
        format!("\"{}\"", hmac.prefix)
    );
    assert_eq!(defaults["principal.hmac.encoding"], "\"hex\"");
    assert_eq!(hmac.encoding, SignatureEncoding::Hex);
}

#[test]
fn the_documents_example_of_tls_has_every_key_of_it() {
    let (_, rest) = DOCUMENT.split_once("## TLS").unwrap();
    let (_, rest) = rest.split_once("```toml\n").unwrap();
    let example = rest.split_once("```").unwrap().0;
    let tls = parse(example).unwrap().listeners[0].tls.clone().unwrap();
    assert!(tls.client.is_some_and(|client| client.crl.is_some()));
    for key in code_keys() {
        if let Some(name) = key.strip_prefix("listener.tls.") {
            assert!(example.contains(&format!(" {name} = ")), "no {key}");
        }
    }
}

#[test]
fn tls_has_its_files_and_room_for_a_record() {
    let tls = |keys: &str| format!("[[listener]]\ntls = {{ {keys} }}\n");
    let pair = "certificate = \"a\", key = \"b\"";
    let both = parse(&tls(pair)).unwrap().listeners[0].tls.clone().unwrap();
    assert_eq!(both.client, None);
    let client = parse(&tls(&format!("{pair}, client_ca = \"c\"")));
    let client = client.unwrap().listeners[0].tls.clone().unwrap().client;
    assert!(client.is_some_and(|client| !client.optional));
    for (text, part) in [
        (tls("certificate = \"a\""), "add the missing one"),
        (
            tls(&format!("{pair}, client_auth = \"optional\"")),
            "`client_ca`",
        ),
        (tls(&format!("{pair}, client_crl = \"c\"")), "`client_ca`"),
        (tls("certificate = \"\", key = \"b\""), "not a path"),
        (
            format!(
                "{}[slabs]\nclasses = [{{ size = \"32KiB\", count = 1 }}]\n",
                tls(pair)
            ),
            "TLS needs a slab class of 36KiB",
        ),
    ] {
        let error = error_of(&text);
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_certificate_of_a_principal_is_known_by_names() {
    let named = |subjects: &str| {
        format!("[[principal]]\nname = \"a\"\ncertificate = {{ subjects = [{subjects}] }}\n")
    };
    let good = parse(&named("\"CN=a,O=b\", \"dns:a.example\", \"uri:urn:a\"")).unwrap();
    assert_eq!(
        good.principals[0].credential,
        Credential::Certificate(vec![
            "CN=a,O=b".into(),
            "dns:a.example".into(),
            "uri:urn:a".into()
        ])
    );
    let warnings = good.warnings();
    assert!(
        warnings.iter().any(|warning| warning.contains("client_ca")),
        "{warnings:?}"
    );
    for (subjects, part) in [
        ("", "0 subjects"),
        ("\"device-1\"", "no name of a certificate"),
        ("\"dns:\"", "no name of a certificate"),
        ("\"CN=a\", \"CN=a\"", "has this name already"),
    ] {
        let error = error_of(&named(subjects));
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn the_examples_of_kusto_are_valid() {
    let (_, kusto) = DOCUMENT.split_once("type = \"kusto\"\n").unwrap();
    let (lines, _) = kusto.split_once("```").unwrap();
    assert!(matches!(
        self::kusto(lines).unwrap().identity,
        Identity::ClientSecret { .. }
    ));
}

#[test]
fn the_example_of_the_document_is_complete() {
    let example: toml::Table = document_example().parse().unwrap();
    for key in code_keys() {
        // They have examples of their own.
        if is_of_access(&key) || key.starts_with("listener.tls") {
            continue;
        }
        let mut value = &toml::Value::Table(example.clone());
        // A key without a default is there as a comment; those of Kusto have an example of their own.
        if ["memory.limit", "route.mapping", "dead_letter.age"].contains(&key.as_str()) {
            let name = key.rsplit('.').next().unwrap();
            assert!(document_example().contains(&format!("# {name} = ")));
            continue;
        }
        if key.starts_with("destination.") && key != "destination.type" && key != "destination.path"
        {
            continue;
        }
        for name in key.split('.') {
            if let toml::Value::Array(values) = value {
                value = &values[0];
            }
            value = value.get(name).unwrap_or_else(|| panic!("no {key}"));
        }
    }
}
