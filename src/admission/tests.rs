//! Tests of admission as a whole: what heads get, by listener and route.

use std::path::Path;

use super::*;

const CONFIG: &str = r#"
    [[principal]]
    name = "token"
    # "secret-a" and "secret-b".
    bearer = [
        { sha256 = "HASH" },
        { file = "b" },
    ]
    [[principal]]
    name = "user"
    basic = { user = "u", passwords = [{ file = "b" }] }
    [[principal]]
    name = "hub"
    hmac = { secrets = [{ file = "hub" }, { file = "b" }] }
    rate = { requests = 1 }
    [[listener]]
    allow = ["10.0.0.0/8", "::1"]
    [[listener]]
    address = "127.0.0.1:1"
    principals = ["token"]
    [[route]]
    path = "/open"
    [[route]]
    path = "/users"
    principals = ["user", "hub"]
    allow = ["10.1.0.0/16"]
    [[route]]
    path = "/slow"
    rate = { bytes = 10, burst = "1ms" }
"#;

fn admission() -> Admission {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("b"), "secret-b\n").unwrap();
    std::fs::write(directory.path().join("hub"), "It's a Secret to Everybody").unwrap();
    let hash: String = {
        use sha2::Digest;
        let hash: [u8; 32] = sha2::Sha256::digest("secret-a").into();
        hash.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let text = CONFIG.replace("HASH", &hash);
    let config = Config::parse(&text, Path::new("weir.toml"), directory.path()).unwrap();
    Admission::load(&config).unwrap()
}

fn ask(
    admission: &Admission,
    (listener_index, route_index): (usize, Option<usize>),
    peer: &str,
    fields: &str,
) -> Result<Option<Admitted>, Reject> {
    let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
    admission.admit(&Request {
        listener_index,
        route_index,
        peer: peer.parse().unwrap(),
        certificate: Certificate::None,
        head: head.as_bytes(),
        size: Some(5),
    })
}

const OPEN: usize = 0;
const USERS: usize = 1;
const SLOW: usize = 2;
const A: &str = "Authorization: Bearer secret-a\r\n";
const B: &str = "Authorization: Bearer secret-b\r\n";
/// `u:secret-b`.
const USER: &str = "authorization: basic dTpzZWNyZXQtYg==\r\n";

fn challenges(bearer: bool, basic: bool, hmac: bool) -> Reject {
    Reject::Unauthenticated(Challenges {
        bearer,
        basic,
        hmac,
    })
}

#[test]
fn a_route_asks_for_its_own_principals_or_else_for_the_listeners() {
    let admission = admission();
    let token = challenges(true, false, false);
    let users = challenges(false, true, true);
    for (place, fields, expected) in [
        ((0, Some(OPEN)), "", Ok(true)),
        ((0, Some(OPEN)), "Authorization: nonsense\r\n", Ok(true)),
        ((1, Some(OPEN)), "", Err(token)),
        ((1, Some(OPEN)), A, Ok(true)),
        ((1, Some(OPEN)), B, Ok(true)),
        (
            (1, Some(OPEN)),
            "Authorization: Bearer secret-c\r\n",
            Err(token),
        ),
        ((1, Some(OPEN)), "Authorization: Bearer\r\n", Err(token)),
        ((1, Some(OPEN)), USER, Err(Reject::Forbidden)),
        // Without a credential one does not even learn that there is no route.
        ((1, None), "", Err(token)),
        ((1, None), A, Ok(false)),
        ((0, None), "", Ok(false)),
        ((0, Some(USERS)), "", Err(users)),
        ((1, Some(USERS)), USER, Ok(true)),
        ((1, Some(USERS)), A, Err(Reject::Forbidden)),
        // `u:secret-a`.
        (
            (1, Some(USERS)),
            "Authorization: Basic dTpzZWNyZXQtYQ==\r\n",
            Err(users),
        ),
    ] {
        let admitted = ask(&admission, place, "10.1.2.3", fields);
        assert_eq!(
            admitted.map(|admitted| admitted.is_some()),
            expected,
            "{place:?} {fields}"
        );
    }
}

#[test]
fn listener_and_route_must_both_allow_the_address() {
    let admission = admission();
    for (place, peer, allowed) in [
        ((0, Some(OPEN)), "10.255.0.1", true),
        ((0, Some(OPEN)), "::ffff:10.0.0.1", true),
        ((0, Some(OPEN)), "::1", true),
        ((0, Some(OPEN)), "11.0.0.1", false),
        ((0, Some(OPEN)), "::2", false),
        ((0, Some(USERS)), "10.1.0.1", true),
        ((0, Some(USERS)), "10.2.0.1", false),
        ((0, Some(USERS)), "::1", false),
        ((1, Some(USERS)), "10.1.0.1", true),
        ((0, None), "11.0.0.1", false),
    ] {
        let admitted = ask(&admission, place, peer, USER);
        assert_eq!(
            admitted != Err(Reject::Forbidden),
            allowed,
            "{place:?} {peer}"
        );
    }
}

#[test]
fn a_signature_is_asked_for_first_and_looked_at_with_the_body() {
    let admission = admission();
    let place = (0, Some(USERS));
    let users = challenges(false, true, true);
    let signed = |digits: &str| format!("X-Hub-Signature-256: sha256={digits}\r\n");
    let good = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
    assert_eq!(
        ask(&admission, place, "10.1.0.1", &signed("00")),
        Err(users)
    );
    let head = |fields: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
    let later = |digits: &str, body: &[u8]| {
        let fields = signed(digits);
        let admitted = ask(&admission, place, "10.1.0.1", &fields)
            .unwrap()
            .unwrap();
        admission.admit_body(&admitted, head(&fields).as_bytes(), body)
    };
    assert_eq!(later(good, b"Hello, World?"), Err(users));
    assert_eq!(later(&"0".repeat(64), b"Hello, World!"), Err(users));
    assert_eq!(later(good, b"Hello, World!"), Ok(()));
    // One a second: the wrong ones were nobody's.
    let limited = Reject::RateLimited {
        retry_after_seconds: 1,
    };
    assert_eq!(later(good, b"Hello, World!"), Err(limited));
    // Whoever shows an Authorization is known by that.
    let both = format!("{}Authorization: Basic x\r\n", signed(good));
    assert_eq!(ask(&admission, place, "10.1.0.1", &both), Err(users));
}

#[test]
fn a_route_takes_what_its_rate_allows() {
    let admission = admission();
    let place = (0, Some(SLOW));
    assert!(ask(&admission, place, "10.0.0.1", "").is_ok());
    assert_eq!(
        ask(&admission, place, "10.0.0.1", ""),
        Err(Reject::RateLimited {
            retry_after_seconds: 1
        })
    );
    // Others are not touched by it.
    assert!(ask(&admission, (0, Some(OPEN)), "10.0.0.1", "").is_ok());
}
