//! The Authorization field: Bearer (RFC 6750 §2.1) and Basic (RFC 7617 §2).
//!
//! Before it: the value of the field.
//! After it: the principal that it is of.
//! Thread: any; pure once loaded. Allocates: at start.
//! Invariant: of a token or a password only its SHA-256 is kept, and every comparison is made with all of them in
//! constant time, so that how long it took says nothing about how much was right.
//! Not here: who may use a route.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use crate::config::Token;
use crate::limits::BASIC_SIZE_MAX;
use crate::secret::{SecretError, SecretSource};

/// What is shown, as far as its form is right.
#[derive(Debug, PartialEq, Eq)]
pub enum Shown<'a> {
    Bearer(&'a [u8]),
    /// `user:password`, in the buffer.
    Basic(&'a [u8]),
}

/// Everything that some principal may show.
#[derive(Default)]
pub struct Credentials {
    tokens: Vec<Known>,
    /// Hashes of `user:password`.
    passwords: Vec<Known>,
}

struct Known {
    hash: [u8; 32],
    principal_index: u32,
}

impl Credentials {
    pub fn add_token(&mut self, principal_index: usize, token: &Token) -> Result<(), SecretError> {
        let hash = match token {
            Token::Secret(source) => Sha256::digest(source.read()?.expose()).into(),
            Token::Sha256(hash) => *hash,
        };
        self.tokens.push(Known {
            hash,
            principal_index: principal_index as u32,
        });
        Ok(())
    }

    pub fn add_password(
        &mut self,
        principal_index: usize,
        user: &str,
        password: &SecretSource,
    ) -> Result<(), SecretError> {
        let mut hash = Sha256::new();
        hash.update(user);
        hash.update(b":");
        hash.update(password.read()?.expose());
        self.passwords.push(Known {
            hash: hash.finalize().into(),
            principal_index: principal_index as u32,
        });
        Ok(())
    }

    /// Of all that a principal may show, in the order of the configuration.
    pub fn hashes(&self, principal_index: usize) -> Vec<[u8; 32]> {
        let known = self.tokens.iter().chain(&self.passwords);
        known
            .filter(|known| known.principal_index as usize == principal_index)
            .map(|known| known.hash)
            .collect()
    }

    /// The principal that the value of an Authorization field belongs to.
    pub fn principal(&self, value: &[u8]) -> Option<usize> {
        let mut buffer = [0; BASIC_SIZE_MAX];
        match parse(value, &mut buffer)? {
            Shown::Bearer(token) => find(&self.tokens, token),
            Shown::Basic(user_password) => find(&self.passwords, user_password),
        }
    }
}

fn find(known: &[Known], shown: &[u8]) -> Option<usize> {
    let shown: [u8; 32] = Sha256::digest(shown).into();
    let mut found = u32::MAX;
    for known in known {
        let is_equal = known.hash.ct_eq(&shown);
        found.conditional_assign(&known.principal_index, is_equal);
    }
    (found != u32::MAX).then_some(found as usize)
}

/// Reads the field; `None` where it has not the form of either scheme.
pub fn parse<'a>(value: &'a [u8], buffer: &'a mut [u8; BASIC_SIZE_MAX]) -> Option<Shown<'a>> {
    let scheme_size = memchr::memchr(b' ', value)?;
    let (scheme, rest) = value.split_at(scheme_size);
    // RFC 9110 §11.4: one or more spaces.
    let spaces = rest.iter().take_while(|byte| **byte == b' ').count();
    let credentials = &rest[spaces..];
    if scheme.eq_ignore_ascii_case(b"bearer") {
        is_token68(credentials).then_some(Shown::Bearer(credentials))
    } else if scheme.eq_ignore_ascii_case(b"basic") {
        let size = STANDARD.decode_slice(credentials, buffer).ok()?;
        let decoded = &buffer[..size];
        decoded.contains(&b':').then_some(Shown::Basic(decoded))
    } else {
        None
    }
}

/// RFC 9110 §11.2.
fn is_token68(text: &[u8]) -> bool {
    let end = text
        .iter()
        .rposition(|byte| *byte != b'=')
        .map_or(0, |at| at + 1);
    end > 0
        && text[..end]
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._~+/".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_schemes_are_read_and_nothing_else() {
        let mut buffer = [0; BASIC_SIZE_MAX];
        for (value, expected) in [
            ("Bearer abc", Some(Shown::Bearer(b"abc"))),
            ("bEARER   a-._~+/9==", Some(Shown::Bearer(b"a-._~+/9=="))),
            ("Basic dXNlcjpwYTpzcw==", Some(Shown::Basic(b"user:pa:ss"))),
            ("basic Og==", Some(Shown::Basic(b":"))),
            ("", None),
            ("Bearer", None),
            ("Bearer ", None),
            ("Bearer =", None),
            ("Bearer a=b", None),
            ("Bearer a b", None),
            ("Bearer\tabc", None),
            ("Bearer a,b", None),
            ("Basic dXNlcg==", None),
            ("Basic dXNlcjpwYTpzcw", None),
            ("Basic dXNlcjpwYTpzcx==", None),
            ("Basic dXNlcjpwYTpzcw== ", None),
            ("Digest username=\"a\"", None),
            (" Bearer abc", None),
        ] {
            assert_eq!(parse(value.as_bytes(), &mut buffer), expected, "{value:?}");
        }
        for (size, fits) in [(BASIC_SIZE_MAX, true), (BASIC_SIZE_MAX + 1, false)] {
            let value = format!("Basic {}", STANDARD.encode(vec![b':'; size]));
            assert_eq!(parse(value.as_bytes(), &mut buffer).is_some(), fits);
        }
    }

    #[test]
    fn the_last_principal_that_matches_is_found_among_all() {
        let mut credentials = Credentials::default();
        for (index, token) in ["a", "b", "c"].into_iter().enumerate() {
            let token = Token::Sha256(Sha256::digest(token).into());
            credentials.add_token(index, &token).unwrap();
        }
        assert_eq!(credentials.principal(b"Bearer a"), Some(0));
        assert_eq!(credentials.principal(b"Bearer c"), Some(2));
        assert_eq!(credentials.principal(b"Bearer d"), None);
        // A token is no password.
        assert_eq!(credentials.principal(b"Basic YTpi"), None);
    }
}
