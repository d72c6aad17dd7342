// Take webhooks: go run consume.go PORT INBOX
//
// Verifies each delivery, writes its events to the file INBOX once each, and answers 204. What is to
// be done with them is done afterwards, here by printing a line for each.
// Environment: WEBHOOK_SECRET, the endpoint's secret; after a rotation both, with a blank between.
package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const mostBytes = 1024 * 1024

// An older timestamp may be somebody's copy of a delivery.
const tolerance = 300 * time.Second

type about struct {
	ID int64 `json:"id"`
}

type event struct {
	ID      string `json:"id"`
	Type    string `json:"type"`
	Order   *about `json:"order"`
	Product *about `json:"product"`
	text    json.RawMessage
}

// isGenuine tells whether a delivery was signed with one of the secrets, a moment ago.
func isGenuine(header http.Header, body []byte, secrets []string, now time.Time) bool {
	id, timestamp := header.Get("webhook-id"), header.Get("webhook-timestamp")
	seconds, err := strconv.ParseInt(timestamp, 10, 64)
	if err != nil {
		return false
	}
	age := now.Sub(time.Unix(seconds, 0))
	if age > tolerance || age < -tolerance {
		return false
	}
	for _, secret := range secrets {
		key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
		if err != nil {
			continue
		}
		mac := hmac.New(sha256.New, key)
		fmt.Fprintf(mac, "%s.%s.", id, timestamp)
		mac.Write(body)
		wanted := []byte("v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil)))
		for _, given := range strings.Fields(header.Get("webhook-signature")) {
			if hmac.Equal([]byte(given), wanted) {
				return true
			}
		}
	}
	return false
}

// inbox keeps events on disk, each once, whichever deliveries they came in. A shop has a table for it.
type inbox struct {
	sync.Mutex
	seen map[string]bool
	file *os.File
}

func openInbox(path string) *inbox {
	box := &inbox{seen: map[string]bool{}}
	text, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		log.Fatal(err)
	}
	// A last line that was cut off was never answered for: it comes again.
	whole := text[:bytes.LastIndexByte(text, '\n')+1]
	for _, line := range bytes.Split(whole, []byte("\n")) {
		var one event
		if json.Unmarshal(line, &one) == nil {
			box.seen[one.ID] = true
		}
	}
	box.file, err = os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		err = box.file.Truncate(int64(len(whole)))
	}
	if err == nil {
		_, err = box.file.Seek(0, io.SeekEnd)
	}
	if err != nil {
		log.Fatal(err)
	}
	return box
}

// add stores the events that are new, and returns them; they survive a crash from here on.
func (box *inbox) add(events []json.RawMessage) ([]event, error) {
	box.Lock()
	defer box.Unlock()
	var fresh []event
	var lines bytes.Buffer
	for _, text := range events {
		one := event{text: text}
		if err := json.Unmarshal(text, &one); err != nil {
			return nil, err
		}
		if !box.seen[one.ID] {
			fresh = append(fresh, one)
			lines.Write(text)
			lines.WriteByte('\n')
		}
	}
	if _, err := box.file.Write(lines.Bytes()); err != nil {
		return nil, err
	}
	if err := box.file.Sync(); err != nil {
		return nil, err
	}
	for _, one := range fresh {
		box.seen[one.ID] = true
	}
	return fresh, nil
}

func handle(work <-chan event) {
	for one := range work {
		for _, what := range []*about{one.Order, one.Product} {
			if what != nil {
				fmt.Println(one.Type, what.ID)
			}
		}
	}
}

func main() {
	secrets := strings.Fields(os.Getenv("WEBHOOK_SECRET"))
	box := openInbox(os.Args[2])
	work := make(chan event, 100_000)
	go handle(work)
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("listening", listener.Addr().(*net.TCPAddr).Port)
	log.Fatal(http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, mostBytes))
		if err != nil {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		if !isGenuine(r.Header, body, secrets, time.Now()) {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		var message struct {
			Data struct {
				Events []json.RawMessage `json:"events"`
			} `json:"data"`
		}
		err = json.Unmarshal(body, &message)
		var fresh []event
		if err == nil {
			fresh, err = box.add(message.Data.Events)
		}
		if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusNoContent) // at once: whoever takes longer than 5 s gets it again
		for _, one := range fresh {
			work <- one
		}
	})))
}
