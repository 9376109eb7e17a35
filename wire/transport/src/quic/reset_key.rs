//! The secret of stateless resets, and what quinn derives from it. It may be replaced while the
//! endpoint is in use: connections that are open keep their ids and their tokens.

use std::{net::SocketAddr, time::Duration};

use aws_lc_rs::hmac;
use quinn_proto::{
    ConnectionId, ConnectionIdGenerator, HashedConnectionIdGenerator, InvalidCid,
    crypto::{CryptoError, HmacKey},
};

use crate::tls::Current;

/// The secret that stateless resets are made from (RFC 9000 §10.3).
///
/// A server that keeps it over a restart makes its peers notice the restart with their next
/// packet instead of after the idle time-out. No two servers may share one: the first that is
/// reached by a packet for a tunnel of the other would end it (RFC 9000 §21.11).
#[derive(Clone)]
pub struct ResetKey([u8; 32]);

impl ResetKey {
    /// The key derived from a secret of any length, such as a private key that outlives restarts,
    /// for the server that `owner` distinguishes from all others that may hold the secret.
    pub fn derive(secret: &[u8], owner: &str) -> Self {
        Self(Self::tag(secret, "culvert reset key")).mixed_with(owner)
    }

    /// The key of the listener that is bound to `address`, of several in one server.
    fn at(&self, address: SocketAddr) -> Self {
        self.mixed_with(&address.to_string())
    }

    fn mixed_with(&self, owner: &str) -> Self {
        Self(Self::tag(&self.0, owner))
    }

    /// The key by which the server's own connection ids are known; it protects nothing.
    fn connection_ids(&self) -> u64 {
        let tag = Self::tag(&self.0, "culvert connection ids");
        u64::from_le_bytes(*tag.first_chunk().expect("a tag has 32 bytes"))
    }

    fn tag(secret: &[u8], purpose: &str) -> [u8; 32] {
        let salt = hmac::Key::new(hmac::HMAC_SHA256, purpose.as_bytes());
        let tag = hmac::sign(&salt, secret);
        tag.as_ref().try_into().expect("a tag of HMAC-SHA-256 has 32 bytes")
    }

    fn hmac(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.0)
    }
}

impl std::fmt::Debug for ResetKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ResetKey(…)")
    }
}

/// The current key of one listener.
#[derive(Clone, Debug)]
pub(super) struct ListenerKey {
    key: Current<ResetKey>,
    address: SocketAddr,
}

impl ListenerKey {
    pub(super) fn new(key: Current<ResetKey>, address: SocketAddr) -> Self {
        Self { key, address }
    }

    fn get(&self) -> ResetKey {
        self.key.get().at(self.address)
    }
}

/// Makes reset tokens with the current key.
pub(super) struct ResetHmac(pub(super) ListenerKey);

impl HmacKey for ResetHmac {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        HmacKey::sign(&self.0.get().hmac(), data, signature_out);
    }

    fn signature_len(&self) -> usize {
        HmacKey::signature_len(&self.0.get().hmac())
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        HmacKey::verify(&self.0.get().hmac(), data, signature)
    }
}

/// Gives connection ids by which a later process with the current key knows its own.
pub(super) struct ConnectionIds(pub(super) ListenerKey);

impl ConnectionIds {
    fn generator(&self) -> HashedConnectionIdGenerator {
        HashedConnectionIdGenerator::from_key(self.0.get().connection_ids())
    }
}

impl ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        self.generator().generate_cid()
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        self.generator().validate(id)
    }

    fn cid_len(&self) -> usize {
        self.generator().cid_len()
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        self.generator().cid_lifetime()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(secret: &str, owner: &str, address: &str) -> [u8; 32] {
        ResetKey::derive(secret.as_bytes(), owner).at(address.parse().unwrap()).0
    }

    #[test]
    fn a_server_keeps_its_reset_key_and_shares_it_with_no_other() {
        let key_of_a = key("secret", "a", "[::]:8132");
        assert_eq!(key_of_a, key("secret", "a", "[::]:8132"), "after a restart");
        for (secret, owner, address) in [
            ("another", "a", "[::]:8132"),
            ("secret", "b", "[::]:8132"),
            ("secret", "a", "[::]:8232"),
            ("secret", "a", "10.0.0.1:8132"),
        ] {
            assert_ne!(key_of_a, key(secret, owner, address), "{secret} {owner} {address}");
        }
    }

    /// The key of a listener whose server holds this secret.
    fn listener(secret: Current<ResetKey>) -> ListenerKey {
        ListenerKey::new(secret, "[::]:8132".parse().unwrap())
    }

    #[test]
    fn a_server_does_not_know_the_connection_ids_of_another() {
        let ids =
            |owner| ConnectionIds(listener(Current::fixed(ResetKey::derive(b"secret", owner))));
        let id = ids("a").generate_cid();
        assert!(ids("a").validate(&id).is_ok());
        assert!(ids("b").validate(&id).is_err());
    }

    #[test]
    fn a_replaced_key_holds_for_what_is_made_later() {
        let (replace, key) = Current::replaceable(ResetKey::derive(b"old", "a"));
        let (tokens, mut ids) = (ResetHmac(listener(key.clone())), ConnectionIds(listener(key)));
        let token = |tokens: &ResetHmac| {
            let mut token = [0; 32];
            tokens.sign(b"an id", &mut token);
            token
        };
        let (old_token, old_id) = (token(&tokens), ids.generate_cid());
        assert!(ids.validate(&old_id).is_ok());
        replace.with(ResetKey::derive(b"new", "a"));
        let new_id = ids.generate_cid();
        assert!(ids.validate(&new_id).is_ok());
        assert!(ids.validate(&old_id).is_err());
        // What a process that starts with the new secret makes.
        let restarted = Current::fixed(ResetKey::derive(b"new", "a"));
        assert_eq!(token(&tokens), token(&ResetHmac(listener(restarted.clone()))));
        assert_ne!(token(&tokens), old_token);
        assert!(ConnectionIds(listener(restarted)).validate(&new_id).is_ok());
    }
}
